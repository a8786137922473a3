// Route and RouteBatch: what service.py does with a request, on what one read of the sockets gave.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "engine.hpp"
#include "histogram.hpp"
#include "listener_proto.hpp"
#include "listener_request.hpp"
#include "listener_session.hpp"

namespace proteus {

struct DecideStats {
    std::uint64_t calls = 0;  // answered with a decision
    std::uint64_t rows = 0;
    std::uint64_t batches = 0;
    std::uint64_t rejected = 0;  // no place
    std::uint64_t expired = 0;   // dropped before compute
};

// Durations: of a call until its batch began, and of batches.
struct DecideTimes {
    Histogram queue;
    Histogram encode;
    Histogram decide;
};

// A queue that was full is kept short until nothing has been refused for a tenth of a second: what
// waits in a full queue is late, and brings no more answers than a short one. The full length is
// tried anyway after a second, then after twice as long each time that is in vain: callers who
// would fit in may come again as often as they are refused.
class Shedding {
  public:
    bool is_on(Clock::time_point now) const {
        return now - refused_ < kCalm && now - begun_ < length_;
    }
    void refuse(Clock::time_point now);

  private:
    static constexpr std::chrono::milliseconds kCalm{100};
    Clock::time_point begun_{}, refused_{};
    std::chrono::seconds length_{1};
};

// Nanoseconds of work a row, as they were lately; one that was interrupted counts little.
class RowCost {
  public:
    void add(Clock::duration spent, std::size_t rows);
    // Rows that so much work is, at least one; all that there are before the first is known.
    std::size_t rows_in(Clock::duration work) const;

  private:
    double ns_ = 0;
};

// Decides for one thread. A call that it holds has its `slot` set.
class Decider {
  public:
    // At most `max_calls` routes of one turn, as many batches, and `max_rows` rows of batches.
    // After a second without a refusal `max_burst` routes more are taken, in one turn or in
    // several: what comes at once after a pause is no overload. While it sheds, a turn's routes,
    // and the batches that wait, are a fraction of a millisecond's work, or as much as came while
    // the thread waited or was not let run.
    Decider(std::size_t max_calls, std::size_t max_rows, std::size_t max_burst = 0);
    ~Decider();

    // Takes a call; false where Python has to decide it. It may be answered at once.
    bool route(const std::shared_ptr<const Served>& served, Call& call);
    bool route_batch(const std::shared_ptr<const Served>& served, Call& call);

    // True, and counted, where the routes since the last decision have taken all places.
    bool turn_away(Clock::time_point now);

    // Decides the routes taken since the last time.
    void decide_routes(const Served& served, Clock::time_point now);

    // Goes on with batches for about `budget`.
    void decide_batches(Clock::duration budget);

    std::size_t batches() const { return jobs_.size(); }
    const DecideStats& stats() const { return stats_; }
    const DecideTimes& times() const { return times_; }

  private:
    struct Pending {
        Call* call = nullptr;
        proto::RouteRequest request;
        std::uint64_t available = 0;
        Mode mode = Mode::kDual;
        Guarantee guarantee = Guarantee::kCertified;
    };
    struct Job;

    void decide_group(const Served& served, Mode mode, Guarantee guarantee);
    void answer(const Served& served, Pending& pending, std::size_t row,
                const Clock::time_point (&times)[3]);
    bool is_full(std::size_t rows, Clock::time_point now) const;
    Clock::duration pause(Clock::time_point now) const;
    bool step(Job& job, Clock::time_point until);
    void answer(Job& job);

    const std::size_t max_calls_;
    const std::size_t max_rows_;
    const std::size_t max_burst_;
    std::size_t burst_;             // left of it
    bool has_turned_away_ = false;  // in this turn
    Clock::time_point turned_away_{};
    Clock::time_point decided_{};  // the end of the last turn's work
    Shedding shed_routes_, shed_batches_;
    RowCost route_cost_, batch_cost_;
    DecideStats stats_;
    DecideTimes times_;

    std::vector<std::unique_ptr<Pending>> pending_;
    std::size_t count_ = 0;

    // of a group
    std::vector<Pending*> group_;
    std::vector<float> x_;
    std::vector<double> tau_;
    std::vector<std::uint64_t> available_;
    std::vector<std::int32_t> choice_;
    std::vector<float> mu_;
    std::vector<float> score_;
    std::vector<std::uint8_t> status_;
    std::vector<float> floor_;
    std::vector<float> scores_;
    std::vector<unsigned> order_;

    std::deque<std::unique_ptr<Job>> jobs_;
    std::size_t job_rows_ = 0;
};

}  // namespace proteus

// libFuzzer: one connection on any bytes, up to the decision. The first byte slices the input.
#include <list>

#include "fixture.hpp"
#include "listener_decide.hpp"

namespace {

using namespace proteus;

class FuzzHost final : public Host {
  public:
    FuzzHost()
        : Host(small_limits(), {{"/proteus.v1.RouterService/Route", {Method::Kind::kRoute}},
                                {"/r", {Method::Kind::kRoute}},
                                {"/b", {Method::Kind::kRouteBatch}},
                                {"/s", {Method::Kind::kForward, Shape::kStream}}}) {
        std::optional<double> tau_max[2][2];
        served_ = std::make_shared<const Served>(fixture::make_snapshot({4, 0, 2, 4}),
                                                 std::vector<std::string>{"a", "b"}, tau_max, "",
                                                 true, true);
        now = Clock::now();
    }

    void arrived(Call& call) override {
        if (call.method->second.kind == Method::Kind::kRoute) {
            decider_.route(served_, call);
        } else if (call.method->second.kind == Method::Kind::kRouteBatch) {
            decider_.route_batch(served_, call);
        } else {
            streams_.push_back(&call);
            call.slot = &streams_.back();
        }
    }
    void touched(Session&) override {}
    bool draining() const override { return false; }

    void work() {
        decider_.decide_routes(*served_, now);
        decider_.decide_batches(std::chrono::milliseconds(1));
        const std::size_t waiting = streams_.size();
        for (std::size_t i = 0; i < waiting; ++i) {
            if (Call* call = streams_.front()) {
                call->leave();
                call->session->reply(*call, true, [](std::string& out) { out += "x"; });
            }
            streams_.pop_front();
        }
    }

  private:
    static Limits small_limits() {
        Limits limits;
        limits.message_bytes = 1 << 16;
        limits.connection_bytes = 1 << 18;
        return limits;
    }

    std::shared_ptr<const Served> served_;
    Decider decider_{16, 4096};
    std::list<Call*> streams_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static FuzzHost host;
    if (size == 0) return 0;
    const std::size_t slice = data[0] + 1;
    {
        Session session(host);
        // past the preface, which no fuzzer has to find
        const std::string preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        session.receive(reinterpret_cast<const std::uint8_t*>(preface.data()), preface.size());
        std::string out;
        for (std::size_t at = 1; at < size; at += slice) {
            if (!session.receive(data + at, std::min(slice, size - at))) break;
            host.work();
            out.clear();
            if (!session.produce(out, 1 << 20)) break;
        }
        host.now += std::chrono::seconds(1);
        session.sweep();
        session.refuse_all(proteus::unavailable());
        session.go_away();
        session.produce(out, 1 << 20);
    }
    host.work();
    if (host.kept_bytes != 0) std::abort();
    return 0;
}

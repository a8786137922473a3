#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <thread>
#include <vector>

#include "batcher.hpp"
#include "bind.hpp"
#include "bind_backend.hpp"
#include "completions.hpp"

namespace proteus::bind {
namespace {

// How long a waiting call ignores signals.
constexpr std::chrono::milliseconds kSignalSlice{50};

// A minute, long before the clock's range ends.
constexpr std::int64_t kMaxWindowUs = 60'000'000;

// Read and written with the GIL.
struct Exit {
    bool begun = false;
    int without_gil = 0;                           // threads inside a Released
    std::vector<std::weak_ptr<Batcher>> batchers;  // those that live
};

Exit& exit_state() {
    static Exit state;
    return state;
}

// The GIL released for what blocks. A thread that asks for it back when the interpreter is gone
// ends the process, a daemon thread at that: the exit waits for those that are inside, and lets
// none in.
class Released {
  public:
    Released() {
        if (exit_state().begun) throw std::runtime_error("batcher: closed");
        ++exit_state().without_gil;
        state_ = PyEval_SaveThread();
    }
    ~Released() {
        PyEval_RestoreThread(state_);
        --exit_state().without_gil;
    }
    Released(const Released&) = delete;
    Released& operator=(const Released&) = delete;

  private:
    PyThreadState* state_;
};

// An Answer as arrays.
struct BatchResult {
    py::array choice;
    py::array mu;
    py::array score;
    py::array status;
    py::array certified_floor;
    py::array scores;
    std::int64_t queue_ns;
    std::int64_t encode_ns;
    std::int64_t decide_ns;
    std::int64_t version;
};

template <typename T>
py::array copied(const std::vector<T>& values) {
    return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

BatchResult make_result(const Answer& answer) {
    return {copied(answer.choice),
            copied(answer.mu),
            copied(answer.score),
            copied(answer.status),
            copied(answer.certified_floor),
            py::array_t<float>({answer.choice.size(), answer.candidates}, answer.scores.data()),
            answer.queue_ns,
            answer.encode_ns,
            answer.decide_ns,
            answer.version};
}

// Whole texts for a backend, which takes str only: one that UTF-8 cannot hold would fail the batch.
void take_prompts(py::handle texts, Query& query) {
    const py::tuple items = py::reinterpret_steal<py::tuple>(PySequence_Tuple(texts.ptr()));
    if (!items) throw py::error_already_set();
    for (std::size_t i = 0; i < items.size(); ++i) {
        const std::string argument = "texts[" + std::to_string(i) + "]";
        const py::handle item = items[i];
        if (!PyUnicode_Check(item.ptr())) reject_type(argument, "a str", type_name(item));
        Py_ssize_t size = 0;
        const char* text = PyUnicode_AsUTF8AndSize(item.ptr(), &size);
        if (!text) {
            PyErr_Clear();
            reject_value(argument, "text that UTF-8 can hold", "a lone surrogate");
        }
        query.prompts.emplace_back(text, static_cast<std::size_t>(size));
    }
}

void take_rows(py::handle texts, py::handle x, bool as_prompts, Query& query) {
    if (texts.is_none() == x.is_none())
        reject_type("texts", "texts or x", texts.is_none() ? "neither" : "both");
    if (x.is_none()) {
        const Texts given(texts);
        if (given.views().empty()) reject_value("texts", "at least one text", "none");
        if (as_prompts) {
            take_prompts(texts, query);
        } else {
            for (const std::string_view text : given.views()) query.texts.emplace_back(text);
        }
        query.rows = as_prompts ? query.prompts.size() : query.texts.size();
        return;
    }
    const py::array rows = take_array<float>("x", x, 2, "(B, D)");
    query.rows = static_cast<std::size_t>(rows.shape(0));
    query.x.assign(data_of<float>(rows), data_of<float>(rows) + rows.size());
}

void take_taus(py::handle tau, Query& query) {
    if (!py::isinstance<py::array>(tau) || py::reinterpret_borrow<py::array>(tau).ndim() == 0) {
        query.tau.assign(1, take_tau(tau));
        return;
    }
    const std::string shape = "(" + std::to_string(query.rows) + ",)";
    const py::array taus = take_array<double>("tau", tau, 1, shape);
    if (static_cast<std::size_t>(taus.shape(0)) != query.rows)
        reject_value("tau", "shape " + shape, shape_text(taus));
    query.tau.assign(data_of<double>(taus), data_of<double>(taus) + taus.size());
}

void take_deadline(py::handle seconds, Query& query) {
    if (seconds.is_none()) return;
    const double wait = take_number("deadline_s", seconds);
    if (std::isnan(wait)) reject_value("deadline_s", "a number of seconds", "nan");
    // beyond a year there is no deadline; the clock's range ends at 292
    if (wait < 3e7)
        query.deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                            std::chrono::duration<double>(std::max(wait, 0.0)));
}

Query take_query(const Batcher& batcher, py::handle texts, py::handle x, py::handle tau,
                 py::handle mode, py::handle guarantee, py::handle available,
                 py::handle deadline_s) {
    Query query;
    take_deadline(deadline_s, query);
    take_rows(texts, x, batcher.takes_prompts(), query);
    take_taus(tau, query);
    if (!mode.is_none()) query.mode = parse_mode(take_name("mode", mode));
    query.guarantee = parse_guarantee(take_name("guarantee", guarantee));
    query.available = take_integer<std::uint64_t>("available", available);
    return query;
}

BatchResult route(Batcher& batcher, py::handle texts, py::handle x, py::handle tau, py::handle mode,
                  py::handle guarantee, py::handle available, py::handle deadline_s) {
    Query query = take_query(batcher, texts, x, tau, mode, guarantee, available, deadline_s);
    Answer answer;
    Batcher::Ticket ticket;
    const auto wait = [&](auto slice) {
        const Released released;
        if (!ticket) ticket = batcher.submit(std::move(query));
        if (!Batcher::wait(ticket, slice)) return false;
        answer = Batcher::take(ticket);
        return true;
    };
    while (!wait(kSignalSlice)) {
        if (PyErr_CheckSignals() != 0) {
            Batcher::abandon(ticket);
            throw py::error_already_set();
        }
    }
    return make_result(answer);
}

// A call that nobody blocks for.
struct Ticket {
    Batcher::Ticket entry;

    BatchResult result() const {
        if (!Batcher::ready(entry))
            throw std::runtime_error("ticket: expected an outcome to take, got none");
        return make_result(Batcher::take(entry));
    }
};

Ticket submit(Batcher& batcher, py::handle texts, py::handle x, py::handle tau,
              const std::shared_ptr<Completions>& completions, std::uint64_t tag, py::handle mode,
              py::handle guarantee, py::handle available, py::handle deadline_s) {
    Query query = take_query(batcher, texts, x, tau, mode, guarantee, available, deadline_s);
    const Released released;
    return {batcher.submit(std::move(query), [completions, tag] { completions->push(tag); })};
}

py::dict stats(const Batcher& batcher) {
    const BatcherStats counts = batcher.stats();
    py::dict out;
    out["submitted"] = counts.submitted;
    out["completed"] = counts.completed;
    out["rejected"] = counts.rejected;
    out["expired"] = counts.expired;
    out["failed"] = counts.failed;
    out["batches"] = counts.batches;
    out["rows"] = counts.rows;
    out["queued_rows"] = counts.queued_rows;
    return out;
}

py::dict times(const Batcher& batcher) {
    const BatcherTimes counts = batcher.times();
    const auto array = [](const Histogram::Counts& values) {
        return py::array_t<std::uint64_t>(static_cast<py::ssize_t>(values.size()), values.data());
    };
    Histogram::Counts bounds;
    for (std::size_t i = 0; i < bounds.size(); ++i) bounds[i] = Histogram::bound_ns(i);
    py::dict out;
    out["bound_ns"] = array(bounds);
    out["queue"] = array(counts.queue);
    out["encode"] = array(counts.encode);
    out["decide"] = array(counts.decide);
    out["total"] = array(counts.total);
    out["sum_ns"] = py::array_t<std::uint64_t>(static_cast<py::ssize_t>(counts.sum_ns.size()),
                                               counts.sum_ns.data());
    return out;
}

// Joins the lanes without the GIL: a backend that runs needs it to end.
void close(Batcher& batcher, bool drain) {
    if (exit_state().begun) return;
    const Released released;
    batcher.close(drain);
}

struct CloseAndDelete {
    void operator()(Batcher* batcher) const {
        // a fork, or its own backend, cannot end its lanes: better a leak than a wait without end
        if (batcher->is_foreign()) return;
        close(*batcher, false);
        delete batcher;
    }
};

// No lane outlives the interpreter: it would ask for the GIL.
void close_all() {
    std::vector<std::shared_ptr<Batcher>> batchers;
    for (const auto& weak : exit_state().batchers)
        if (auto batcher = weak.lock()) batchers.push_back(std::move(batcher));
    exit_state().begun = true;
    {
        const py::gil_scoped_release release;
        for (const auto& batcher : batchers) batcher->close(false);
    }
    while (exit_state().without_gil > 0) {
        const py::gil_scoped_release release;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

std::shared_ptr<Batcher> make_batcher(py::handle snapshot, py::handle encode, py::handle route,
                                      py::handle max_batch_size, py::handle max_queue_rows,
                                      py::handle window_us, py::handle token_budget,
                                      py::handle max_text_tokens, py::handle lanes,
                                      py::handle before) {
    BatcherOptions options;
    options.max_batch_size = take_size("max_batch_size", max_batch_size, 1);
    options.max_queue_rows = take_size("max_queue_rows", max_queue_rows, 1);
    options.window = std::chrono::microseconds(take_size("window_us", window_us, 0, kMaxWindowUs));
    options.tokens.budget = take_size("token_budget", token_budget, 0);
    options.tokens.text = take_size("max_text_tokens", max_text_tokens, 0);
    options.lanes = take_size("lanes", lanes, 1);
    std::shared_ptr<const Snapshot> held =
        take_shared<Snapshot>("snapshot", "a Snapshot", snapshot);
    if (!held) reject_type("snapshot", "a Snapshot", "None");
    const auto previous = take_shared<Batcher>("before", "a Batcher or None", before);
    Backend backend = make_backend(encode, route, held->candidates);
    const std::shared_ptr<Batcher> batcher(
        new Batcher(std::move(held), options, std::move(backend), previous.get()),
        CloseAndDelete());
    auto& batchers = exit_state().batchers;
    batchers.erase(std::remove_if(batchers.begin(), batchers.end(),
                                  [](const auto& weak) { return weak.expired(); }),
                   batchers.end());
    batchers.push_back(batcher);
    return batcher;
}

void set_error(const BackendFailed& failed) {
    const py::object error =
        py::reinterpret_borrow<py::object>(PyExc_RuntimeError)(py::str(failed.what()));
    PyException_SetCause(error.ptr(), py::handle(failed.cause.get()).inc_ref().ptr());
    PyErr_SetObject(PyExc_RuntimeError, error.ptr());
}

}  // namespace

void bind_batcher(py::module_& module) {
    // the threads that were inside are not in the fork, whose exit would wait for them for ever;
    // the one that forks has the GIL
    if (::pthread_atfork(nullptr, nullptr, [] { exit_state().without_gil = 0; }) != 0)
        throw std::runtime_error("pthread_atfork: expected memory for a handler, got none");
    py::register_exception<QueueFull>(module, "QueueFullError", PyExc_RuntimeError);
    py::register_exception_translator([](std::exception_ptr error) {
        try {
            std::rethrow_exception(error);
        } catch (const DeadlinePassed& passed) {
            PyErr_SetString(PyExc_TimeoutError, passed.what());
        } catch (const BackendFailed& failed) {
            set_error(failed);
        }
    });
    py::class_<BatchResult>(module, "BatchResult", py::is_final(), plain_metaclass(),
                            "Decisions of one call, with their timings.")
        .def_readonly("choice", &BatchResult::choice)
        .def_readonly("mu", &BatchResult::mu)
        .def_readonly("score", &BatchResult::score)
        .def_readonly("status", &BatchResult::status)
        .def_readonly("certified_floor", &BatchResult::certified_floor)
        .def_readonly("scores", &BatchResult::scores)
        .def_readonly("queue_ns", &BatchResult::queue_ns)
        .def_readonly("encode_ns", &BatchResult::encode_ns)
        .def_readonly("decide_ns", &BatchResult::decide_ns)
        .def_readonly("version", &BatchResult::version);
    py::class_<Completions, std::shared_ptr<Completions>>(
        module, "Completions", py::is_final(), plain_metaclass(),
        "Tags of calls that have an outcome, behind one descriptor for an event loop.")
        .def(py::init<>())
        .def("fileno", &Completions::fd, "The descriptor, readable while a tag waits.")
        .def(
            "drain",
            [](Completions& completions) {
                py::list tags;
                for (const std::uint64_t tag : completions.drain()) tags.append(tag);
                return tags;
            },
            "The tags that have arrived since the last call.");
    py::class_<Ticket>(module, "Ticket", py::is_final(), plain_metaclass(),
                       "A call that is queued, computed or done.")
        .def("result", &Ticket::result, "The answer, once; raises what went wrong.")
        .def(
            "abandon", [](const Ticket& ticket) { Batcher::abandon(ticket.entry); },
            "Say that nobody waits: a queued call is dropped, and no tag comes.");
    const py::object none = py::none();
    py::class_<Batcher, std::shared_ptr<Batcher>>(
        module, "Batcher", py::is_final(), plain_metaclass(),
        "Threads that decide what is there as a batch, one unless lanes says otherwise.")
        .def(py::init(&make_batcher), py::arg("snapshot"), py::kw_only(), py::arg("encode") = none,
             py::arg("route") = none, py::arg("max_batch_size") = 256,
             py::arg("max_queue_rows") = 4096, py::arg("window_us") = 0,
             py::arg("token_budget") = 0, py::arg("max_text_tokens") = 0, py::arg("lanes") = 1,
             py::arg("before") = none)
        .def("route", &route, py::arg("texts"), py::arg("x"), py::arg("tau"), py::kw_only(),
             py::arg("mode") = none, py::arg("guarantee") = "certified",
             py::arg("available") = ~std::uint64_t{0}, py::arg("deadline_s") = none,
             "Decide rows in a batch with other callers'; blocks without the GIL.")
        .def("submit", &submit, py::arg("texts"), py::arg("x"), py::arg("tau"), py::kw_only(),
             py::arg("completions").none(false), py::arg("tag"), py::arg("mode") = none,
             py::arg("guarantee") = "certified", py::arg("available") = ~std::uint64_t{0},
             py::arg("deadline_s") = none,
             "As route, at once: tag comes out of completions when there is an outcome.")
        .def("close", &close, py::arg("drain") = true,
             "Refuse new calls; finish the queued ones, or fail them with drain=False.")
        .def("stats", &stats, "Counts since the start, and queued_rows now.")
        .def("times", &times, "Histograms of durations, and the bound above each bucket.");
    py::module_::import("atexit").attr("register")(py::cpp_function(&close_all));
}

}  // namespace proteus::bind

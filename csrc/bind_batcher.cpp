#include <chrono>
#include <cmath>
#include <memory>

#include "batcher.hpp"
#include "bind.hpp"

namespace proteus::bind {
namespace {

// How long a waiting call ignores signals.
constexpr std::chrono::milliseconds kSignalSlice{50};

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

void take_rows(py::handle texts, py::handle x, Query& query) {
    if (texts.is_none() == x.is_none())
        reject_type("texts", "texts or x", texts.is_none() ? "neither" : "both");
    if (x.is_none()) {
        const Texts given(texts);
        if (given.views().empty()) reject_value("texts", "at least one text", "none");
        for (const std::string_view text : given.views()) query.texts.emplace_back(text);
        query.rows = query.texts.size();
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

BatchResult route(Batcher& batcher, py::handle texts, py::handle x, py::handle tau, py::handle mode,
                  py::handle guarantee, py::handle available, py::handle deadline_s) {
    Query query;
    take_deadline(deadline_s, query);
    take_rows(texts, x, query);
    take_taus(tau, query);
    if (!mode.is_none()) query.mode = parse_mode(take_name("mode", mode));
    query.guarantee = parse_guarantee(take_name("guarantee", guarantee));
    query.available = take_integer<std::uint64_t>("available", available);
    Answer answer;
    Batcher::Ticket ticket;
    const auto wait = [&](auto slice) {
        const py::gil_scoped_release release;
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

std::shared_ptr<const Snapshot> take_snapshot(py::handle object) {
    auto snapshot = take_shared<Snapshot>("snapshot", "a Snapshot", object);
    if (!snapshot) reject_type("snapshot", "a Snapshot", "None");
    return snapshot;
}

std::size_t take_size(const char* argument, py::handle object, std::int64_t least) {
    const auto value = take_integer<std::int64_t>(argument, object);
    if (value < least)
        reject_value(argument, "at least " + std::to_string(least), std::to_string(value));
    return static_cast<std::size_t>(value);
}

// The worker is joined without the GIL; it never takes it, but a waiter may.
struct ReleaseAndDelete {
    void operator()(Batcher* batcher) const {
        const py::gil_scoped_release release;
        delete batcher;
    }
};
using BatcherPointer = std::unique_ptr<Batcher, ReleaseAndDelete>;

}  // namespace

void bind_batcher(py::module_& module) {
    py::register_exception<QueueFull>(module, "QueueFullError", PyExc_RuntimeError);
    py::register_exception_translator([](std::exception_ptr error) {
        try {
            std::rethrow_exception(error);
        } catch (const DeadlinePassed& passed) {
            PyErr_SetString(PyExc_TimeoutError, passed.what());
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
    const py::object none = py::none();
    py::class_<Batcher, BatcherPointer>(module, "Batcher", py::is_final(), plain_metaclass(),
                                        "One worker thread that decides what is there as a batch.")
        .def(py::init([](py::handle snapshot, py::handle max_batch_size, py::handle max_queue_rows,
                         py::handle window_us) {
                 BatcherOptions options;
                 options.max_batch_size = take_size("max_batch_size", max_batch_size, 1);
                 options.max_queue_rows = take_size("max_queue_rows", max_queue_rows, 1);
                 options.window = std::chrono::microseconds(take_size("window_us", window_us, 0));
                 return BatcherPointer(new Batcher(take_snapshot(snapshot), options));
             }),
             py::arg("snapshot"), py::kw_only(), py::arg("max_batch_size") = 256,
             py::arg("max_queue_rows") = 4096, py::arg("window_us") = 0)
        .def("route", &route, py::arg("texts"), py::arg("x"), py::arg("tau"), py::kw_only(),
             py::arg("mode") = none, py::arg("guarantee") = "certified",
             py::arg("available") = ~std::uint64_t{0}, py::arg("deadline_s") = none,
             "Decide rows in a batch with other callers'; blocks without the GIL.")
        .def(
            "swap",
            [](Batcher& batcher, py::handle snapshot) { batcher.swap(take_snapshot(snapshot)); },
            py::arg("snapshot"), "Decide the next batches by another snapshot.")
        .def("close", &Batcher::close, py::arg("drain") = true,
             py::call_guard<py::gil_scoped_release>(),
             "Refuse new calls; finish the queued ones, or fail them with drain=False.")
        .def("stats", &stats, "Counts since the start, and queued_rows now.");
}

}  // namespace proteus::bind

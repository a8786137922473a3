#include <cmath>
#include <optional>
#include <system_error>

#include "bind.hpp"
#include "listener.hpp"

namespace proteus::bind {
namespace {

// Methods of this service are refused while the server drains.
constexpr std::string_view kRouterService = "/proteus.v1.RouterService/";

std::string take_string(const char* argument, py::handle object) {
    return std::string(take_name(argument, object));
}

py::tuple take_tuple(const char* argument, const char* expected, py::handle object) {
    if (PyUnicode_Check(object.ptr()) || !PySequence_Check(object.ptr()))
        reject_type(argument, expected, type_name(object));
    auto items = py::reinterpret_steal<py::tuple>(PySequence_Tuple(object.ptr()));
    if (!items) throw py::error_already_set();
    return items;
}

std::vector<std::string> take_strings(const char* argument, py::handle object) {
    std::vector<std::string> values;
    for (const py::handle item : take_tuple(argument, "a sequence of str", object))
        values.push_back(take_string(argument, item));
    return values;
}

bool take_bool(const char* argument, py::handle object) {
    if (!PyBool_Check(object.ptr())) reject_type(argument, "a bool", type_name(object));
    return object.ptr() == Py_True;
}

std::chrono::nanoseconds take_seconds(const char* argument, py::handle object) {
    const double seconds = take_number(argument, object);
    if (!(seconds >= 0.0 && seconds <= 3e7))
        reject_value(argument, "0 to 3e7 seconds", py::str(object).cast<std::string>());
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
        std::chrono::duration<double>(seconds));
}

// The largest targets of one mode: certified, calibrated.
void take_largest(py::handle object, std::optional<double> (&out)[2]) {
    const py::tuple pair = take_tuple("tau_max", "pairs of float or None", object);
    if (pair.size() != 2) reject_value("tau_max", "pairs", std::to_string(pair.size()));
    for (std::size_t i = 0; i < 2; ++i)
        if (!pair[i].is_none()) out[i] = take_number("tau_max", pair[i]);
}

std::shared_ptr<Served> make_served(py::handle snapshot, py::handle names, py::handle tau_max,
                                    py::handle versions, py::handle decides_text,
                                    py::handle decides_embedding) {
    auto shared = take_shared<Snapshot>("snapshot", "a Snapshot", snapshot);
    if (!shared) reject_type("snapshot", "a Snapshot", "None");
    const py::tuple modes = take_tuple("tau_max", "a pair of pairs", tau_max);
    if (modes.size() != 2) reject_value("tau_max", "2 modes", std::to_string(modes.size()));
    std::optional<double> largest[2][2];
    for (std::size_t mode = 0; mode < 2; ++mode) take_largest(modes[mode], largest[mode]);
    if (!PyBytes_Check(versions.ptr())) reject_type("versions", "bytes", type_name(versions));
    return std::make_shared<Served>(
        shared, take_strings("names", names), largest, versions.cast<std::string>(),
        take_bool("decides_text", decides_text), take_bool("decides_embedding", decides_embedding));
}

std::shared_ptr<const Served> take_served(py::handle object) {
    auto served = take_shared<Served>("served", "a Served", object);
    if (!served) reject_type("served", "a Served", "None");
    return served;
}

// A call that Python has to answer; one that it forgets is refused.
class ForwardedCall {
  public:
    explicit ForwardedCall(std::shared_ptr<Forwarded> call) : call_(std::move(call)) {}
    ForwardedCall(ForwardedCall&&) = default;
    ~ForwardedCall() {
        if (call_) call_->refuse(plain(Code::kInternal, "internal error"));
    }

    const std::string& method() const { return call_->method; }
    py::bytes message() const { return call_->message; }
    bool is_active() const { return call_->is_active(); }
    std::optional<double> remaining_s() const {
        if (call_->deadline == Clock::time_point::max()) return std::nullopt;
        return std::chrono::duration<double>(call_->deadline - Clock::now()).count();
    }
    void reply(const py::bytes& message) { call_->reply(message); }
    void refuse(py::handle code, py::handle text, const py::bytes& details) {
        const int number = take_integer<int>("code", code);
        if (number < 1 || number > 16) reject_value("code", "1 to 16", std::to_string(number));
        call_->refuse({number, take_string("text", text), base64(std::string(details))});
    }

  private:
    std::shared_ptr<Forwarded> call_;
};

std::optional<ForwardedCall> take_call(Listener& listener, py::handle wait_s) {
    const auto wait = take_seconds("wait_s", wait_s);
    std::shared_ptr<Forwarded> call;
    {
        const py::gil_scoped_release release;
        call = listener.take(wait);
    }
    if (!call) return std::nullopt;
    return ForwardedCall(std::move(call));
}

// Its threads are joined without the GIL; they never take it, but a thread of Python may wait.
struct ReleaseAndDelete {
    void operator()(Listener* listener) const {
        const py::gil_scoped_release release;
        delete listener;
    }
};
using ListenerPointer = std::unique_ptr<Listener, ReleaseAndDelete>;

ListenerPointer make_listener(py::handle sockets, py::handle served, py::handle calls,
                              py::handle streams, py::handle threads, py::handle connections,
                              py::handle max_calls, py::handle max_rows, py::handle max_forwarded,
                              py::handle age_s) {
    std::vector<int> descriptors;
    for (const py::handle item : take_tuple("sockets", "a sequence of int", sockets))
        descriptors.push_back(take_integer<int>("sockets", item));
    Methods methods;
    for (const Shape shape : {Shape::kUnary, Shape::kStream}) {
        const bool is_unary = shape == Shape::kUnary;
        for (const std::string& path :
             take_strings(is_unary ? "calls" : "streams", is_unary ? calls : streams))
            methods[path] = {Method::Kind::kForward, shape, path.starts_with(kRouterService)};
    }
    ListenerOptions options;
    options.threads = take_size("threads", threads, 1);
    options.connections = take_size("connections", connections, 1);
    options.max_calls = take_size("max_calls", max_calls, 1);
    options.max_rows = take_size("max_rows", max_rows, 1);
    options.max_forwarded = take_size("max_forwarded", max_forwarded, 1);
    options.age =
        std::chrono::duration_cast<std::chrono::milliseconds>(take_seconds("age_s", age_s));
    const auto shared = take_served(served);
    try {
        return ListenerPointer(new Listener(descriptors, shared, methods, options));
    } catch (const std::system_error& error) {
        errno = error.code().value();
        PyErr_SetFromErrno(PyExc_OSError);
        throw py::error_already_set();
    }
}

py::dict stats(const Listener& listener) {
    const ListenerStats counts = listener.stats();
    py::dict out;
    out["calls"] = counts.decide.calls;
    out["rows"] = counts.decide.rows;
    out["batches"] = counts.decide.batches;
    out["rejected"] = counts.decide.rejected;
    out["expired"] = counts.decide.expired;
    out["connections"] = counts.connections;
    out["accepted"] = counts.accepted;
    out["refused_connections"] = counts.refused_connections;
    out["forwarded"] = counts.forwarded;
    out["waiting"] = counts.waiting;
    out["cut_off"] = counts.cut_off;
    return out;
}

py::dict times(const Listener& listener) {
    const ListenerTimes counts = listener.times();
    const auto array = [](const Histogram::Counts& values) {
        return py::array_t<std::uint64_t>(static_cast<py::ssize_t>(values.size()), values.data());
    };
    py::dict out;
    out["queue"] = array(counts.queue);
    out["encode"] = array(counts.encode);
    out["decide"] = array(counts.decide);
    out["sum_ns"] = py::array_t<std::uint64_t>(static_cast<py::ssize_t>(counts.sum_ns.size()),
                                               counts.sum_ns.data());
    return out;
}

py::dict calls(const Listener& listener) {
    py::dict out;
    for (const auto& [path, counts] : listener.calls()) {
        py::list values;
        for (const auto& count : counts) values.append(count.load(std::memory_order_relaxed));
        out[py::str(path)] = values;
    }
    return out;
}

}  // namespace

void bind_listener(py::module_& module) {
    py::class_<Served, std::shared_ptr<Served>>(
        module, "Served", py::is_final(), plain_metaclass(),
        "A loaded router and what its replies say of it. Immutable.")
        .def(py::init(&make_served), py::arg("snapshot"), py::kw_only(), py::arg("names"),
             py::arg("tau_max"), py::arg("versions"), py::arg("decides_text") = true,
             py::arg("decides_embedding") = true);
    py::class_<ForwardedCall>(module, "ForwardedCall", py::is_final(), plain_metaclass(),
                              "A message that Python has to answer.")
        .def_property_readonly("method", &ForwardedCall::method)
        .def_property_readonly("message", &ForwardedCall::message)
        .def_property_readonly("remaining_s",
                               [](const ForwardedCall& call) -> py::object {
                                   const auto remaining = call.remaining_s();
                                   return remaining ? py::object(py::float_(*remaining))
                                                    : py::object(py::none());
                               })
        .def("is_active", &ForwardedCall::is_active)
        .def("reply", &ForwardedCall::reply, py::arg("message"))
        .def("refuse", &ForwardedCall::refuse, py::arg("code"), py::arg("text"),
             py::arg("details") = py::bytes());
    py::class_<Listener, ListenerPointer>(
        module, "Listener", py::is_final(), plain_metaclass(),
        "gRPC on sockets: Route, RouteBatch and health by threads of its own.")
        .def(py::init(&make_listener), py::arg("sockets"), py::arg("served"), py::kw_only(),
             py::arg("calls") = py::tuple(), py::arg("streams") = py::tuple(),
             py::arg("threads") = 1, py::arg("connections") = 1024, py::arg("max_calls") = 256,
             py::arg("max_rows") = 65536, py::arg("max_forwarded") = 264, py::arg("age_s") = 0.0)
        .def(
            "swap",
            [](Listener& listener, py::handle served) { listener.swap(take_served(served)); },
            py::arg("served"), "Decide the next reads by another router.")
        .def(
            "set_health",
            [](Listener& listener, py::handle service, py::handle status) {
                listener.set_health(take_string("service", service),
                                    take_integer<int>("status", status));
            },
            py::arg("service"), py::arg("status"), "Status by the health protocol's numbers.")
        .def("refuse_new", &Listener::refuse_new, "Answer new calls with UNAVAILABLE.")
        .def(
            "drain",
            [](Listener& listener, py::handle seconds) {
                const auto limit = take_seconds("seconds", seconds);
                const py::gil_scoped_release release;
                listener.drain(limit);
            },
            py::arg("seconds"), "Say GOAWAY, let what is open finish, refuse the rest, stop.")
        .def(
            "take",
            [](Listener& listener, py::handle wait_s) -> py::object {
                auto call = take_call(listener, wait_s);
                return call ? py::cast(std::move(*call)) : py::object(py::none());
            },
            py::arg("wait_s"), "The next call that Python has to answer, None after wait_s.")
        .def("stats", &stats, "Counts since the start; connections and waiting now.")
        .def("times", &times,
             "Histograms of durations since the start, in the buckets of Batcher.times.")
        .def("calls", &calls, "Calls answered since the start: path -> counts by status, 0 to 16.");
}

}  // namespace proteus::bind

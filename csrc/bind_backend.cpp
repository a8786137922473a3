#include "bind_backend.hpp"

#include <algorithm>
#include <cstring>
#include <span>
#include <string_view>
#include <vector>

namespace proteus::bind {
namespace {

py::list to_list(std::span<const std::string_view> texts) {
    py::list list(texts.size());
    for (std::size_t i = 0; i < texts.size(); ++i)
        list[i] = py::str(texts[i].data(), texts[i].size());
    return list;
}

template <typename T>
py::array_t<T> copied(const T* values, std::vector<py::ssize_t> shape) {
    return py::array_t<T>(std::move(shape), values);
}

template <typename T>
void take_column(const char* name, py::handle object, std::vector<T>& out) {
    const std::string shape = "(" + std::to_string(out.size()) + ",)";
    const py::array array = take_array<T>(std::string("route: ") + name, object, 1, shape);
    if (static_cast<std::size_t>(array.size()) != out.size())
        reject_value(std::string("route: ") + name, "shape " + shape, shape_text(array));
    std::copy_n(data_of<T>(array), out.size(), out.begin());
}

void take_answer(py::handle object, std::size_t candidates, Answer& answer) {
    if (!PySequence_Check(object.ptr()))
        reject_type("route", "a sequence of five or six arrays", type_name(object));
    const auto parts = py::reinterpret_steal<py::tuple>(PySequence_Tuple(object.ptr()));
    if (!parts) throw py::error_already_set();
    if (parts.size() != 5 && parts.size() != 6)
        reject_value("route", "five or six arrays", std::to_string(parts.size()));
    take_column("choice", parts[0], answer.choice);
    take_column("mu", parts[1], answer.mu);
    take_column("score", parts[2], answer.score);
    take_column("status", parts[3], answer.status);
    take_column("certified_floor", parts[4], answer.certified_floor);
    answer.scores.clear();
    if (parts.size() == 5) return;
    const std::string shape =
        "(" + std::to_string(answer.choice.size()) + ", " + std::to_string(candidates) + ")";
    const py::array scores = take_array<float>("route: scores", parts[5], 2, shape);
    if (static_cast<std::size_t>(scores.shape(0)) != answer.choice.size() ||
        static_cast<std::size_t>(scores.shape(1)) != candidates)
        reject_value("route: scores", "shape " + shape, shape_text(scores));
    answer.scores.assign(data_of<float>(scores), data_of<float>(scores) + scores.size());
}

std::shared_ptr<PyObject> take_callable(const char* argument, py::handle object) {
    if (!PyCallable_Check(object.ptr()))
        reject_type(argument, "a callable or None", type_name(object));
    return share(object);
}

// Calls with the GIL; what Python raises leaves without it, and without a reference to it.
template <typename F>
void with_python(F call) {
    const py::gil_scoped_acquire gil;
    try {
        call();
    } catch (const py::error_already_set& error) {
        throw BackendFailed(error);
    } catch (const py::builtin_exception& error) {
        // what it returned is wrong: no argument of the callers is
        error.set_error();
        throw BackendFailed(py::error_already_set());
    }
}

}  // namespace

std::shared_ptr<PyObject> share(py::handle object) {
    return {object.inc_ref().ptr(), [](PyObject* held) {
                const py::gil_scoped_acquire gil;
                Py_DECREF(held);
            }};
}

BackendFailed::BackendFailed(const py::error_already_set& error)
    : std::runtime_error("backend: expected an answer, got " + type_name(error.value())),
      cause(share(error.value())) {
    if (error.trace()) PyException_SetTraceback(cause.get(), error.trace().ptr());
}

Backend make_backend(py::handle encode, py::handle route, std::size_t candidates) {
    Backend backend;
    if (!encode.is_none() && !route.is_none()) reject_type("route", "None with encode", "both");
    if (!encode.is_none())
        backend.encode = [callable = take_callable("encode", encode)](
                             std::span<const std::string_view> texts, std::size_t dim, float* x) {
            with_python([&] {
                const py::object result = py::handle(callable.get())(to_list(texts));
                const std::string shape =
                    "(" + std::to_string(texts.size()) + ", " + std::to_string(dim) + ")";
                const py::array rows = take_array<float>("encode", result, 2, shape);
                if (static_cast<std::size_t>(rows.shape(0)) != texts.size() ||
                    static_cast<std::size_t>(rows.shape(1)) != dim)
                    reject_value("encode", "shape " + shape, shape_text(rows));
                std::memcpy(x, rows.data(), texts.size() * dim * sizeof(float));
            });
        };
    if (!route.is_none())
        backend.route = [callable = take_callable("route", route), candidates](
                            std::span<const std::string_view> texts, const Request& request,
                            std::size_t dim, Answer& answer) {
            with_python([&] {
                const auto rows = static_cast<py::ssize_t>(request.rows);
                py::object list = py::none();
                py::object x = py::none();
                if (request.x) {
                    x = copied(request.x, {rows, static_cast<py::ssize_t>(dim)});
                } else {
                    list = to_list(texts);
                }
                const py::object result = py::handle(callable.get())(
                    list, x, copied(request.tau, {rows}),
                    request.mode == Mode::kDual ? "dual" : "policy",
                    request.guarantee == Guarantee::kCertified ? "certified" : "calibrated",
                    copied(request.available, {rows}));
                take_answer(result, candidates, answer);
            });
        };
    return backend;
}

}  // namespace proteus::bind

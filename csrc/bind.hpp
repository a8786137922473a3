// Checks and conversions shared by the bindings.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace proteus::bind {

namespace py = pybind11;

[[noreturn]] inline void reject_value(const std::string& argument, const std::string& expected,
                                      const std::string& got) {
    throw py::value_error(argument + ": expected " + expected + ", got " + got);
}

[[noreturn]] inline void reject_type(const std::string& argument, const std::string& expected,
                                     const std::string& got) {
    throw py::type_error(argument + ": expected " + expected + ", got " + got);
}

inline std::string type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

inline std::string shape_text(const py::array& array) {
    return py::str(array.attr("shape")).cast<std::string>();
}

// "float64 array of shape (3, 4)", or the type where it is no array.
inline std::string describe(py::handle object) {
    if (!py::isinstance<py::array>(object)) return type_name(object);
    const auto array = py::reinterpret_borrow<py::array>(object);
    return py::str(array.dtype()).cast<std::string>() + " array of shape " + shape_text(array);
}

template <typename T>
inline constexpr const char* kTypeName = nullptr;
template <>
inline constexpr const char* kTypeName<float> = "float32";
template <>
inline constexpr const char* kTypeName<double> = "float64";
template <>
inline constexpr const char* kTypeName<bool> = "bool";
template <>
inline constexpr const char* kTypeName<std::int8_t> = "int8";
template <>
inline constexpr const char* kTypeName<std::int32_t> = "int32";
template <>
inline constexpr const char* kTypeName<std::uint64_t> = "uint64";

template <typename T>
bool is_array_of(py::handle object) {
    return py::array_t<T, py::array::c_style>::check_(object) &&
           (py::detail::array_proxy(object.ptr())->flags &
            py::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0;
}

// A C-contiguous array of T with `ndim` dimensions, borrowed without a copy.
template <typename T>
py::array take_array(const std::string& argument, py::handle object, py::ssize_t ndim,
                     const std::string& shape) {
    if (is_array_of<T>(object)) {
        auto array = py::reinterpret_borrow<py::array>(object);
        if (array.ndim() == ndim) return array;
        reject_value(argument, "shape " + shape, shape_text(array));
    }
    const std::string wanted =
        std::string("a C-contiguous ") + kTypeName<T> + " array of shape " + shape;
    std::string got = describe(object);
    if (py::isinstance<py::array_t<T>>(object)) got += " that is not contiguous or not aligned";
    reject_type(argument, wanted, got);
}

template <typename T>
const T* data_of(const py::array& array) {
    return static_cast<const T*>(array.data());
}

// A number in [0, 1] known from its Python value.
inline double take_tau(py::handle object) {
    double tau = PyFloat_CheckExact(object.ptr()) ? PyFloat_AS_DOUBLE(object.ptr())
                                                  : PyFloat_AsDouble(object.ptr());
    if (tau == -1.0 && PyErr_Occurred()) {
        PyErr_Clear();
        reject_type("tau", "a number or a float array of shape (B,)", type_name(object));
    }
    if (!(tau >= 0.0 && tau <= 1.0))
        reject_value("tau", "a number in [0, 1]", py::str(object).cast<std::string>());
    return tau;
}

inline std::string_view take_name(const char* argument, py::handle object) {
    Py_ssize_t size = 0;
    const char* text =
        PyUnicode_Check(object.ptr()) ? PyUnicode_AsUTF8AndSize(object.ptr(), &size) : nullptr;
    if (!text) {
        PyErr_Clear();
        reject_type(argument, "a str", type_name(object));
    }
    return {text, static_cast<std::size_t>(size)};
}

inline double take_number(const char* argument, py::handle object) {
    const double value = PyFloat_AsDouble(object.ptr());
    if (value == -1.0 && PyErr_Occurred()) {
        PyErr_Clear();
        reject_type(argument, "a number", type_name(object));
    }
    return value;
}

// An int that fits T.
template <typename T>
T take_integer(const char* argument, py::handle object) {
    if (!PyIndex_Check(object.ptr())) reject_type(argument, "an int", type_name(object));
    const auto index = py::reinterpret_steal<py::int_>(PyNumber_Index(object.ptr()));
    if (!index) throw py::error_already_set();
    py::detail::make_caster<T> caster;
    if (!caster.load(index, false)) {
        PyErr_Clear();
        reject_value(argument,
                     "an int from " + std::to_string(std::numeric_limits<T>::min()) + " to " +
                         std::to_string(std::numeric_limits<T>::max()),
                     py::str(index).cast<std::string>());
    }
    return py::detail::cast_op<T>(caster);
}

// A number of things.
inline std::size_t take_size(const char* argument, py::handle object, std::int64_t least,
                             std::int64_t most = std::numeric_limits<std::int64_t>::max()) {
    const auto value = take_integer<std::int64_t>(argument, object);
    if (value < least)
        reject_value(argument, "at least " + std::to_string(least), std::to_string(value));
    if (value > most)
        reject_value(argument, "at most " + std::to_string(most), std::to_string(value));
    return static_cast<std::size_t>(value);
}

// An instance of T, null for None.
template <typename T>
std::shared_ptr<T> take_shared(const char* argument, const char* type, py::handle object) {
    if (object.is_none()) return nullptr;
    if (!py::isinstance<T>(object)) reject_type(argument, type, type_name(object));
    return object.cast<std::shared_ptr<T>>();
}

// Bytes of str and bytes objects, and the references that keep them alive.
class Texts {
  public:
    explicit Texts(py::handle sequence) {
        if (PyUnicode_Check(sequence.ptr()) || PyBytes_Check(sequence.ptr()) ||
            !PySequence_Check(sequence.ptr()))
            reject_type("texts", "a sequence of str or bytes", type_name(sequence));
        // a tuple of its own: the caller's list may change while the GIL is released
        items_ = py::reinterpret_steal<py::tuple>(PySequence_Tuple(sequence.ptr()));
        if (!items_) throw py::error_already_set();
        views_.reserve(items_.size());
        for (std::size_t i = 0; i < items_.size(); ++i) views_.push_back(view(items_[i], i));
    }

    const std::vector<std::string_view>& views() const { return views_; }

  private:
    std::string_view view(py::handle item, std::size_t index) {
        if (PyUnicode_Check(item.ptr())) {
            Py_ssize_t size = 0;
            const char* data = PyUnicode_AsUTF8AndSize(item.ptr(), &size);
            if (data) return {data, static_cast<std::size_t>(size)};
            // lone surrogates have no UTF-8; they pass as three bytes each
            PyErr_Clear();
            auto encoded = py::reinterpret_steal<py::object>(
                PyUnicode_AsEncodedString(item.ptr(), "utf-8", "surrogatepass"));
            if (!encoded) throw py::error_already_set();
            keep_.push_back(encoded);
            item = encoded;
        }
        if (!PyBytes_Check(item.ptr()))
            reject_type("texts[" + std::to_string(index) + "]", "a str or bytes", type_name(item));
        return {PyBytes_AS_STRING(item.ptr()),
                static_cast<std::size_t>(PyBytes_GET_SIZE(item.ptr()))};
    }

    py::tuple items_{0};
    std::vector<py::object> keep_;
    std::vector<std::string_view> views_;
};

// `type` itself, as the stub says; pybind11's metaclass serves static properties, of which there
// are none.
inline py::metaclass plain_metaclass() {
    return py::metaclass(reinterpret_cast<PyObject*>(&PyType_Type));
}

void bind_hashing(py::module_& module);
void bind_engine(py::module_& module);
void bind_batcher(py::module_& module);
void bind_listener(py::module_& module);

}  // namespace proteus::bind

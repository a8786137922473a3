#include <algorithm>
#include <array>
#include <memory>
#include <new>
#include <stdexcept>

#include "bind.hpp"
#include "engine.hpp"
#include "forward.hpp"

namespace proteus::bind {
namespace {

// Below this many rows the work is shorter than a switch of the GIL.
constexpr std::size_t kReleaseRows = 8;

// Arguments of route and scores: a request and what its pointers refer to. They are the call's own,
// as Python may run between one and the next, and call again.
struct Arguments {
    Request request;
    double tau;
    py::array x;
    py::array tau_array;
    py::array price;
    py::array ids;
    std::vector<double> taus;
    std::vector<double> prices;
    std::vector<std::uint64_t> masks;
};

py::array take_x(const Snapshot& snapshot, py::handle object) {
    if (is_array_of<float>(object)) {
        auto x = py::reinterpret_borrow<py::array>(object);
        if (x.ndim() == 2 && static_cast<std::size_t>(x.shape(1)) == snapshot.input_dim) return x;
    }
    const std::string shape = "(B, " + std::to_string(snapshot.input_dim) + ")";
    const py::array x = take_array<float>("x", object, 2, shape);
    reject_value("x", "shape " + shape, shape_text(x));
}

// (B,) or, for `columns` > 0, (columns,) or (B, columns); the stride of a row in `stride`.
void check_shape(const char* argument, const py::array& array, std::size_t rows,
                 std::size_t columns, std::size_t& stride) {
    const auto at = [&](py::ssize_t i) { return static_cast<std::size_t>(array.shape(i)); };
    if (columns == 0) {
        if (array.ndim() != 1 || at(0) != rows)
            reject_value(argument, "shape (" + std::to_string(rows) + ",)", shape_text(array));
        stride = 1;
    } else if (array.ndim() == 1 && at(0) == columns) {
        stride = 0;
    } else if (array.ndim() == 2 && at(0) == rows && at(1) == columns) {
        stride = columns;
    } else {
        const std::string k = std::to_string(columns);
        reject_value(argument, "shape (" + k + ",) or (" + std::to_string(rows) + ", " + k + ")",
                     shape_text(array));
    }
}

// Numbers as double: borrowed where they are, converted into `buffer` from float32.
const double* take_numbers(const char* argument, py::handle object, std::size_t rows,
                           std::size_t columns, std::size_t& stride, py::array& keep,
                           std::vector<double>& buffer) {
    const bool wide = is_array_of<double>(object);
    if (!wide && !is_array_of<float>(object))
        reject_type(argument, "a C-contiguous float64 or float32 array", describe(object));
    keep = py::reinterpret_borrow<py::array>(object);
    check_shape(argument, keep, rows, columns, stride);
    if (wide) return data_of<double>(keep);
    const float* from = data_of<float>(keep);
    // never null: a null pointer would mean that the argument was not given
    buffer.reserve(1);
    buffer.assign(from, from + keep.size());
    return buffer.data();
}

const std::uint64_t* take_available(py::handle object, std::size_t rows, std::size_t candidates,
                                    std::size_t& stride, std::vector<std::uint64_t>& buffer) {
    if (!is_array_of<bool>(object))
        reject_type("available", "a C-contiguous bool array", describe(object));
    const auto array = py::reinterpret_borrow<py::array>(object);
    check_shape("available", array, rows, candidates, stride);
    const std::size_t masks = stride ? rows : 1;
    const auto* allowed = static_cast<const std::uint8_t*>(array.data());
    stride = stride ? 1 : 0;
    buffer.reserve(1);
    buffer.assign(masks, 0);
    for (std::size_t r = 0; r < masks; ++r)
        for (std::size_t i = 0; i < candidates; ++i)
            buffer[r] |= static_cast<std::uint64_t>(allowed[r * candidates + i] != 0) << i;
    return buffer.data();
}

Mode take_mode(const Snapshot& snapshot, py::handle object) {
    if (object.is_none()) return snapshot.options.default_mode;
    const Mode mode = parse_mode(take_name("mode", object));
    if (mode == Mode::kPolicy && !snapshot.policy)
        reject_value("mode", "\"dual\" (the checkpoint has no policy)", "\"policy\"");
    return mode;
}

// Values of the arguments by position; null where one is absent.
enum Argument { kX, kTau, kMode, kGuarantee, kAvailable, kPrice, kIds, kSample, kSeed, kArguments };
constexpr const char* kArgumentNames[kArguments] = {
    "x", "tau", "mode", "guarantee", "available", "price_usd", "ids", "sample", "seed"};
using Given = std::array<PyObject*, kArguments>;

bool given(PyObject* object) { return object && object != Py_None; }

void take_arguments(const Snapshot& snapshot, const Given& args, Arguments& out) {
    Request& request = out.request;
    out.x = take_x(snapshot, args[kX]);
    const auto rows = static_cast<std::size_t>(out.x.shape(0));
    request.x = data_of<float>(out.x);
    request.rows = rows;
    const py::handle tau = args[kTau];
    if (!PyFloat_CheckExact(tau.ptr()) && py::isinstance<py::array>(tau) &&
        py::reinterpret_borrow<py::array>(tau).ndim() > 0) {
        request.tau =
            take_numbers("tau", tau, rows, 0, request.tau_stride, out.tau_array, out.taus);
    } else {
        out.tau = take_tau(tau);
        request.tau = &out.tau;
    }
    request.mode = args[kMode] ? take_mode(snapshot, args[kMode]) : snapshot.options.default_mode;
    if (args[kGuarantee])
        request.guarantee = parse_guarantee(take_name("guarantee", args[kGuarantee]));
    const std::size_t k = snapshot.candidates;
    if (given(args[kAvailable]))
        request.available =
            take_available(args[kAvailable], rows, k, request.available_stride, out.masks);
    if (given(args[kPrice]))
        request.price_usd = take_numbers("price_usd", args[kPrice], rows, k, request.price_stride,
                                         out.price, out.prices);
    if (given(args[kIds])) {
        out.ids =
            take_array<std::uint64_t>("ids", args[kIds], 1, "(" + std::to_string(rows) + ",)");
        std::size_t stride;
        check_shape("ids", out.ids, rows, 0, stride);
        request.ids = data_of<std::uint64_t>(out.ids);
    }
    if (args[kSample]) {
        if (!PyBool_Check(args[kSample])) reject_type("sample", "a bool", type_name(args[kSample]));
        request.sample = args[kSample] == Py_True;
    }
    if (args[kSeed]) request.seed = take_integer<std::uint64_t>("seed", args[kSeed]);
    if (request.sample && request.mode != Mode::kPolicy)
        reject_value("sample", "mode \"policy\"", "mode \"dual\"");
}

// A new array, made with one call of NumPy's API.
template <typename T>
T* add_array(PyObject* tuple, Py_ssize_t index, std::size_t rows, std::size_t columns = 0) {
    auto& api = py::detail::npy_api::get();
    const Py_intptr_t shape[2] = {static_cast<Py_intptr_t>(rows),
                                  static_cast<Py_intptr_t>(columns)};
    PyObject* type = api.PyArray_DescrFromType_(py::detail::npy_format_descriptor<T>::value);
    PyObject* array = api.PyArray_NewFromDescr_(api.PyArray_Type_, type, columns ? 2 : 1, shape,
                                                nullptr, nullptr, 0, nullptr);
    if (!array) throw py::error_already_set();
    PyTuple_SET_ITEM(tuple, index, array);
    return reinterpret_cast<T*>(py::detail::array_proxy(array)->data);
}

py::object decide_call(const Snapshot& snapshot, const Given& args, bool all_scores) {
    Arguments arguments;
    take_arguments(snapshot, args, arguments);
    const Request& request = arguments.request;
    const std::size_t rows = request.rows;
    auto result = py::reinterpret_steal<py::object>(PyTuple_New(all_scores ? 7 : 5));
    if (!result) throw py::error_already_set();
    Decisions out;
    out.choice = add_array<std::int32_t>(result.ptr(), 0, rows);
    out.mu = add_array<float>(result.ptr(), 1, rows);
    out.score = add_array<float>(result.ptr(), 2, rows);
    out.status = add_array<std::uint8_t>(result.ptr(), 3, rows);
    out.certified_floor = add_array<float>(result.ptr(), 4, rows);
    if (all_scores) {
        out.predicted = add_array<float>(result.ptr(), 5, rows, snapshot.candidates);
        out.scores = add_array<float>(result.ptr(), 6, rows, snapshot.candidates);
    }
    if (rows > kReleaseRows) {
        const py::gil_scoped_release release;
        decide(snapshot, request, out);
    } else {
        decide(snapshot, request, out);
    }
    return result;
}

// Sorts positional and keyword arguments by name.
Given sort_arguments(const char* function, PyObject* const* args, Py_ssize_t count,
                     PyObject* names) {
    Given sorted{};
    if (count > kArguments) reject_type(function, "at most 9 arguments", std::to_string(count));
    std::copy_n(args, count, sorted.begin());
    const Py_ssize_t keywords = names ? PyTuple_GET_SIZE(names) : 0;
    for (Py_ssize_t i = 0; i < keywords; ++i) {
        const std::string_view name = take_name("keyword", PyTuple_GET_ITEM(names, i));
        const auto at = std::find(std::begin(kArgumentNames), std::end(kArgumentNames), name) -
                        std::begin(kArgumentNames);
        if (at == kArguments)
            reject_type(function, "a known argument", "\"" + std::string(name) + "\"");
        if (sorted[at]) reject_type(kArgumentNames[at], "one value", "two");
        sorted[at] = args[count + i];
    }
    for (const Argument at : {kX, kTau})
        if (!sorted[at]) reject_type(kArgumentNames[at], "a value", "nothing");
    return sorted;
}

// pybind11's dispatch costs a microsecond with this many arguments, so that route and scores are
// plain C methods.
template <bool AllScores>
PyObject* decide_method(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* names) {
    try {
        // the method descriptor has checked the type of self
        auto* instance = reinterpret_cast<py::detail::instance*>(self);
        const auto* snapshot =
            static_cast<const Snapshot*>(instance->get_value_and_holder().value_ptr());
        if (!snapshot) reject_type("self", "an initialised Snapshot", "none");
        const Given sorted = sort_arguments(AllScores ? "scores" : "route", args, count, names);
        return decide_call(*snapshot, sorted, AllScores).release().ptr();
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (const py::builtin_exception& error) {
        error.set_error();
    } catch (const std::invalid_argument& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

#define PROTEUS_ROUTE_SIGNATURE                                                             \
    "($self, /, x, tau, mode=None, guarantee='certified', available=None, price_usd=None, " \
    "ids=None, sample=False, seed=0)\n--\n\n"

PyMethodDef kRoute = {
    "route", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&decide_method<false>)),
    METH_FASTCALL | METH_KEYWORDS,
    "route" PROTEUS_ROUTE_SIGNATURE "Decide a batch: choice, mu, score, status, certified_floor."};
PyMethodDef kScores = {
    "scores", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&decide_method<true>)),
    METH_FASTCALL | METH_KEYWORDS,
    "scores" PROTEUS_ROUTE_SIGNATURE "route's arrays, then predicted (B, K) and scores (B, K)."};

void add_method(py::handle type, PyMethodDef* method) {
    auto descriptor = py::reinterpret_steal<py::object>(
        PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), method));
    if (!descriptor) throw py::error_already_set();
    type.attr(method->ml_name) = descriptor;
}

py::array_t<std::int32_t> path_choices(const Snapshot& snapshot, py::handle x, py::handle mode,
                                       py::handle price_usd) {
    const py::array rows = take_x(snapshot, x);
    Request request;
    request.x = data_of<float>(rows);
    request.rows = static_cast<std::size_t>(rows.shape(0));
    request.mode = take_mode(snapshot, mode);
    const Path* path = snapshot.path(request.mode);
    if (!path) reject_value("mode", "a mode with a Path", "\"policy\"");
    py::array keep;
    std::vector<double> prices;
    if (!price_usd.is_none())
        request.price_usd = take_numbers("price_usd", price_usd, request.rows, snapshot.candidates,
                                         request.price_stride, keep, prices);
    py::array_t<std::int32_t> out({path->parameter().size(), request.rows});
    std::int32_t* choice = out.mutable_data();
    const py::gil_scoped_release release;
    choose_path(snapshot, request, choice);
    return out;
}

py::array_t<float> mean_over_tokens(py::handle hidden, py::handle mask) {
    const py::array x = take_array<float>("hidden", hidden, 3, "(B, T, D)");
    const auto at = [&](py::ssize_t i) { return static_cast<std::size_t>(x.shape(i)); };
    const std::size_t rows = at(0), tokens = at(1), dim = at(2);
    const std::string shape = "(" + std::to_string(rows) + ", " + std::to_string(tokens) + ")";
    const py::array live = take_array<bool>("mask", mask, 2, shape);
    if (live.shape(0) != x.shape(0) || live.shape(1) != x.shape(1))
        reject_value("mask", "shape " + shape, shape_text(live));
    py::array_t<float> pooled({rows, dim});
    float* out = pooled.mutable_data();
    const float* from = data_of<float>(x);
    const auto* allowed = static_cast<const std::uint8_t*>(live.data());
    const py::gil_scoped_release release;
    for (std::size_t r = 0; r < rows; ++r)
        masked_mean(from + r * tokens * dim, allowed + r * tokens, tokens, dim, out + r * dim);
    return pooled;
}

std::shared_ptr<Path> make_path(py::handle parameter, py::handle certified,
                                py::handle certified_max, py::handle calibrated,
                                py::handle calibrated_max) {
    const py::array p = take_array<float>("parameter", parameter, 1, "(V,)");
    const py::array a = take_array<std::int32_t>("certified", certified, 1, "(1001,)");
    const py::array b = take_array<std::int32_t>("calibrated", calibrated, 1, "(1001,)");
    const auto span = [](const py::array& array) {
        return std::span<const std::int32_t>(data_of<std::int32_t>(array), array.size());
    };
    return std::make_shared<Path>(
        std::vector<float>(data_of<float>(p), data_of<float>(p) + p.size()), span(a),
        take_integer<int>("certified_max", certified_max), span(b),
        take_integer<int>("calibrated_max", calibrated_max));
}

Tensors take_tensors(py::handle object, std::vector<py::array>& keep) {
    if (!PyDict_Check(object.ptr())) reject_type("tensors", "a dict", type_name(object));
    Tensors views;
    for (const auto& [name_object, value] : py::reinterpret_borrow<py::dict>(object)) {
        const std::string name(take_name("tensors", name_object));
        if (!is_array_of<float>(value))
            reject_type("tensors[\"" + name + "\"]", "a C-contiguous float32 array",
                        describe(value));
        keep.push_back(py::reinterpret_borrow<py::array>(value));
        const py::array& array = keep.back();
        views[name] = {data_of<float>(array),
                       std::vector<std::size_t>(array.shape(), array.shape() + array.ndim())};
    }
    return views;
}

std::shared_ptr<Snapshot> make_snapshot(py::handle tensors, py::handle link, py::handle head,
                                        py::handle kappa, py::handle gamma, py::handle price_usd,
                                        py::handle cost_unit_usd, py::handle key,
                                        py::handle default_mode, py::handle dual, py::handle policy,
                                        py::handle encoder, py::handle version) {
    std::vector<py::array> keep;
    const Tensors views = take_tensors(tensors, keep);
    SnapshotOptions options;
    const std::string link_name(take_name("link", link));
    if (link_name != "sigmoid" && link_name != "clip")
        reject_value("link", "\"sigmoid\" or \"clip\"", "\"" + link_name + "\"");
    options.link = link_name == "sigmoid" ? Link::kSigmoid : Link::kClip;
    if (!head.is_none() || views.contains("policy.w1")) {
        const std::string name(take_name("head", head));
        if (name != "residual" && name != "free")
            reject_value("head", "\"residual\" or \"free\"", "\"" + name + "\"");
        options.head = name == "free" ? Head::kFree : Head::kResidual;
    }
    options.kappa = take_number("kappa", kappa);
    options.gamma = take_number("gamma", gamma);
    const py::array price = take_array<float>("price_usd", price_usd, 1, "(K,)");
    options.price_usd.assign(data_of<float>(price), data_of<float>(price) + price.size());
    options.cost_unit_usd = take_number("cost_unit_usd", cost_unit_usd);
    options.key = take_integer<std::uint64_t>("key", key);
    options.default_mode = parse_mode(take_name("default_mode", default_mode), "default_mode");
    options.dual = take_shared<Path>("dual", "a Path", dual);
    options.policy = take_shared<Path>("policy", "a Path or None", policy);
    options.encoder = take_shared<HashEncoder>("encoder", "a HashEncoder or None", encoder);
    options.version = take_integer<std::int64_t>("version", version);
    return std::make_shared<Snapshot>(views, std::move(options));
}

std::shared_ptr<Snapshot> change_snapshot(const Snapshot& from, py::handle price_usd,
                                          py::handle available, py::handle certified,
                                          py::handle version, py::handle tally) {
    Change change;
    if (!price_usd.is_none()) {
        const py::array price = take_array<float>("price_usd", price_usd, 1, "(K,)");
        if (static_cast<std::size_t>(price.size()) != from.candidates)
            reject_value("price_usd", "shape (" + std::to_string(from.candidates) + ",)",
                         shape_text(price));
        change.price_usd.assign(data_of<float>(price), data_of<float>(price) + price.size());
    }
    change.available = take_integer<std::uint64_t>("available", available);
    if (!PyBool_Check(certified.ptr())) reject_type("certified", "a bool", type_name(certified));
    change.certified = certified.ptr() == Py_True;
    change.version = take_integer<std::int64_t>("version", version);
    change.tally = take_shared<Tally>("tally", "a Tally or None", tally);
    return std::make_shared<Snapshot>(from.changed(std::move(change)));
}

py::array_t<std::uint64_t> tally_counts(const Tally& tally) {
    py::array_t<std::uint64_t> out({tally.candidates() + 1, Tally::kStatuses});
    for (py::ssize_t i = 0; i < out.size(); ++i)
        out.mutable_data()[i] = tally.count(static_cast<std::size_t>(i));
    return out;
}

std::shared_ptr<Tally> make_tally(py::handle candidates) {
    const auto count = take_integer<std::int64_t>("candidates", candidates);
    if (count < 1 || count > static_cast<std::int64_t>(kMaxCandidates))
        reject_value("candidates", "1 to 64", std::to_string(count));
    return std::make_shared<Tally>(static_cast<std::size_t>(count));
}

}  // namespace

void bind_engine(py::module_& module) {
    py::class_<Path, std::shared_ptr<Path>>(
        module, "Path", py::is_final(), plain_metaclass(),
        "Policies from the most accurate to the cheapest, and which one serves a tau.")
        .def(py::init(&make_path), py::arg("parameter"), py::arg("certified"),
             py::arg("certified_max"), py::arg("calibrated"), py::arg("calibrated_max"));
    const py::object none = py::none();
    py::class_<Tally, std::shared_ptr<Tally>>(module, "Tally", py::is_final(), plain_metaclass(),
                                              "Rows by candidate and status.")
        .def(py::init(&make_tally), py::arg("candidates"))
        .def("counts", &tally_counts,
             "Counts since the start, (K + 1, 5) uint64: a row a candidate, the last of those "
             "without one; a column a Status.");
    py::class_<Snapshot, std::shared_ptr<Snapshot>> cls(
        module, "Snapshot", py::is_final(), plain_metaclass(), "Immutable loaded router.");
    cls.def(py::init(&make_snapshot), py::kw_only(), py::arg("tensors"), py::arg("link"),
            py::arg("head"), py::arg("kappa"), py::arg("gamma"), py::arg("price_usd"),
            py::arg("cost_unit_usd"), py::arg("key"), py::arg("default_mode"), py::arg("dual"),
            py::arg("policy"), py::arg("encoder"), py::arg("version") = 0)
        .def_property_readonly("input_dim", [](const Snapshot& s) { return s.input_dim; })
        .def_property_readonly("candidates", [](const Snapshot& s) { return s.candidates; })
        .def_property_readonly("version", [](const Snapshot& s) { return s.options.version; })
        .def("changed", &change_snapshot, py::kw_only(), py::arg("price_usd") = none,
             py::arg("available") = ~std::uint64_t{0}, py::arg("certified") = true,
             py::arg("version") = 0, py::arg("tally") = none,
             "The same router with other prices (K,) float32 or fewer candidates; not certified: "
             "every answer is UNCERTIFIED.")
        .def("choose_path", &path_choices, py::arg("x"), py::arg("mode"),
             py::arg("price_usd") = none,
             "Choice of every row at every vertex of the mode's path, (V, B) int32.");
    module.def("masked_mean", &mean_over_tokens, py::arg("hidden"), py::arg("mask"),
               "Mean of hidden states (B, T, D) over the tokens that count, (B, D) float32.");
    add_method(cls, &kRoute);
    add_method(cls, &kScores);
}

}  // namespace proteus::bind

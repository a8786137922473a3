#include <bit>
#include <memory>

#include "bind.hpp"
#include "hashing.hpp"
#include "random.hpp"

namespace proteus::bind {
namespace {

// Below this many texts the work is shorter than a switch of the GIL.
constexpr std::size_t kReleaseTexts = 2;

template <typename T>
py::array_t<T> copied(const std::vector<T>& values) {
    return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

std::shared_ptr<const HashEncoder> make_encoder(py::object table, py::object row_scale,
                                                py::object idf, py::object block_weight) {
    const py::array t = take_array<std::int8_t>("table", table, 2, "(rows, D)");
    const std::string shape = "(" + std::to_string(t.shape(0)) + ",)";
    const auto vector = [&](const char* name, py::object& object, py::ssize_t n) {
        py::array array = take_array<float>(name, object, 1, "(" + std::to_string(n) + ",)");
        if (array.shape(0) != n)
            reject_value(name, "shape (" + std::to_string(n) + ",)", shape_text(array));
        return array;
    };
    const py::array scale = vector("row_scale", row_scale, t.shape(0));
    const py::array frequency = vector("idf", idf, t.shape(0));
    const py::array weight = vector("block_weight", block_weight, kBlocks);
    return std::make_shared<const HashEncoder>(
        data_of<std::int8_t>(t), t.shape(0), t.shape(1), data_of<float>(scale),
        data_of<float>(frequency), std::span<const float>(data_of<float>(weight), kBlocks));
}

py::array_t<float> encode(const HashEncoder& encoder, py::object sequence) {
    const Texts texts(sequence);
    const auto& views = texts.views();
    py::array_t<float> out({views.size(), encoder.dim()});
    float* rows = out.mutable_data();
    const auto work = [&] {
        for (std::size_t i = 0; i < views.size(); ++i)
            encoder.encode(views[i], rows + i * encoder.dim());
    };
    if (views.size() >= kReleaseTexts) {
        const py::gil_scoped_release release;
        work();
    } else {
        work();
    }
    return out;
}

py::tuple features(py::object sequence, std::int64_t rows) {
    if (rows < 2 || rows > static_cast<std::int64_t>(kMaxRows) ||
        !std::has_single_bit(static_cast<std::uint64_t>(rows)))
        reject_value("rows", "a power of two from 2 to 2^28", std::to_string(rows));
    const auto bits = static_cast<unsigned>(std::bit_width(static_cast<std::uint64_t>(rows)) - 1);
    const Texts texts(sequence);
    std::vector<std::int64_t> indptr{0};
    std::vector<std::int32_t> index;
    std::vector<float> count;
    std::vector<std::uint8_t> block;
    {
        const py::gil_scoped_release release;
        for (const std::string_view text : texts.views()) {
            for (const Feature& feature : hash_features(text, bits)) {
                index.push_back(static_cast<std::int32_t>(feature.row));
                count.push_back(static_cast<float>(feature.count));
                block.push_back(feature.block);
            }
            indptr.push_back(static_cast<std::int64_t>(index.size()));
        }
    }
    return py::make_tuple(copied(indptr), copied(index), copied(count), copied(block));
}

py::array_t<std::uint64_t> row_hashes(py::object x, std::uint64_t key) {
    if (is_array_of<std::uint64_t>(x)) {
        const py::array ids = take_array<std::uint64_t>("x", x, 1, "(B,)");
        py::array_t<std::uint64_t> out(ids.shape(0));
        for (py::ssize_t i = 0; i < ids.shape(0); ++i)
            out.mutable_data()[i] = id_hash(data_of<std::uint64_t>(ids)[i], key);
        return out;
    }
    const py::array rows = take_array<float>("x", x, 2, "(B, D)");
    py::array_t<std::uint64_t> out(rows.shape(0));
    for (py::ssize_t i = 0; i < rows.shape(0); ++i)
        out.mutable_data()[i] =
            row_hash(data_of<float>(rows) + i * rows.shape(1), rows.shape(1), key);
    return out;
}

py::array_t<std::uint32_t> philox_words(std::uint64_t seed, std::uint64_t row,
                                        std::uint32_t tries) {
    py::array_t<std::uint32_t> out({static_cast<py::ssize_t>(tries), py::ssize_t{4}});
    for (std::uint32_t i = 0; i < tries; ++i) {
        const auto words = philox_try(seed, row, i);
        std::copy(words.begin(), words.end(), out.mutable_data() + 4 * i);
    }
    return out;
}

py::array_t<double> beta_samples(py::object conc1, py::object conc0, std::uint64_t seed) {
    const py::array a = take_array<double>("conc1", conc1, 1, "(B,)");
    const py::array b = take_array<double>("conc0", conc0, 1, "(B,)");
    if (a.shape(0) != b.shape(0)) reject_value("conc0", "shape " + shape_text(a), shape_text(b));
    py::array_t<double> out(a.shape(0));
    for (py::ssize_t i = 0; i < a.shape(0); ++i)
        out.mutable_data()[i] = sample_beta(data_of<double>(a)[i], data_of<double>(b)[i], seed, i);
    return out;
}

}  // namespace

void bind_hashing(py::module_& module) {
    py::class_<HashEncoder, std::shared_ptr<HashEncoder>>(
        module, "HashEncoder", py::is_final(), plain_metaclass(),
        "Immutable table of hashed features; encodes texts.")
        .def(py::init([](py::object table, py::object row_scale, py::object idf,
                         py::object block_weight) {
                 return std::const_pointer_cast<HashEncoder>(
                     make_encoder(table, row_scale, idf, block_weight));
             }),
             py::arg("table"), py::arg("row_scale"), py::arg("idf"), py::arg("block_weight"))
        .def_property_readonly("dim", &HashEncoder::dim)
        .def_property_readonly("rows", &HashEncoder::rows)
        .def("encode", &encode, py::arg("texts"),
             "Pooled embedding of every text, (B, D) float32.");
    module.def("hash_features", &features, py::arg("texts"), py::arg("rows"),
               "Distinct features of every text: indptr, index, count, block.");
    module.def("row_hash", &row_hashes, py::arg("x"), py::arg("key"),
               "Keyed 64-bit hash of rows (B, D) float32 or of ids (B,) uint64.");
    module.def("philox", &philox_words, py::arg("seed"), py::arg("row"), py::arg("tries"),
               "Philox4x32-10 words of the first tries of a row, (tries, 4) uint32.");
    module.def("sample_beta", &beta_samples, py::arg("conc1"), py::arg("conc0"), py::arg("seed"),
               "One Beta sample a row, (B,) float64, reproducible by (seed, row).");
}

}  // namespace proteus::bind

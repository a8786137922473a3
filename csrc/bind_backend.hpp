// Python callables in the place of the core's steps.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>

#include "batch.hpp"
#include "bind.hpp"

namespace proteus::bind {

// What a callable raised, carried to every caller of its batch: RuntimeError in Python, with the
// exception as its cause. The text names the exception's type only, as its own may hold a prompt.
struct BackendFailed : std::runtime_error {
    explicit BackendFailed(const py::error_already_set& error);

    std::shared_ptr<PyObject> cause;
};

// A reference that any thread may drop, with the GIL or without it.
std::shared_ptr<PyObject> share(py::handle object);

// The backend of two callables, None for the core's own step. Both are called with the GIL, on a
// lane's thread:
// encode(texts: list[str]) -> (texts, input_dim) float32;
// route(texts: list[str] | None, x: (B, D) float32 | None, tau: (B,) float64, mode: str,
//       guarantee: str, available: (B,) uint64) -> choice, mu, score, status, certified_floor
//       [, scores (B, K)].
Backend make_backend(py::handle encode, py::handle route, std::size_t candidates);

}  // namespace proteus::bind

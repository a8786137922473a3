#include "bind.hpp"

PYBIND11_MODULE(_core, module) {
    module.doc() = "Native core of proteus_fast: hashing, decisions, batching.";
    proteus::bind::bind_hashing(module);
    proteus::bind::bind_engine(module);
    proteus::bind::bind_batcher(module);
#ifdef PROTEUS_LISTENER
    proteus::bind::bind_listener(module);
#endif
}

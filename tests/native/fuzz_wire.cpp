// libFuzzer: the readers of messages and headers on any bytes.
#include "listener_proto.hpp"
#include "listener_status.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace proteus;
    const std::string_view bytes(reinterpret_cast<const char*>(data), size);
    static proto::RouteRequest route;
    proto::RouteBatchRequest batch;
    proto::HealthCheckRequest health;
    proto::parse(bytes, route);
    proto::parse(bytes, batch);
    proto::parse(bytes, health);
    parse_timeout(bytes);
    percent_encoded(bytes);
    base64(bytes);
    return 0;
}

// What libnghttp2 calls for a session.
#pragma once

#include <nghttp2/nghttp2.h>

#include "listener_session.hpp"

namespace proteus {

nghttp2_session_callbacks* session_callbacks();

// What is sent as the body of a call.
nghttp2_data_provider reply_body(Call& call);

}  // namespace proteus

#include "listener_callbacks.hpp"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

namespace proteus {

struct Callbacks {
    static Session& self(void* user) { return *static_cast<Session*>(user); }
    static Call* call(nghttp2_session* session, std::int32_t stream) {
        return static_cast<Call*>(nghttp2_session_get_stream_user_data(session, stream));
    }

    static int begin_headers(nghttp2_session* session, const nghttp2_frame* frame, void* user) {
        if (frame->hd.type != NGHTTP2_HEADERS || frame->headers.cat != NGHTTP2_HCAT_REQUEST)
            return 0;
        Call* call = self(user).open(frame->hd.stream_id);
        return nghttp2_session_set_stream_user_data(session, frame->hd.stream_id, call);
    }

    static int header(nghttp2_session* session, const nghttp2_frame* frame,
                      const std::uint8_t* name, std::size_t name_size, const std::uint8_t* value,
                      std::size_t value_size, std::uint8_t, void* user) {
        Call* found = call(session, frame->hd.stream_id);
        if (found && frame->headers.cat == NGHTTP2_HCAT_REQUEST)
            self(user).header(*found, {reinterpret_cast<const char*>(name), name_size},
                              {reinterpret_cast<const char*>(value), value_size});
        return 0;
    }

    static int frame(nghttp2_session* session, const nghttp2_frame* frame, void* user) {
        Session& me = self(user);
        const auto& hd = frame->hd;
        const bool ends = hd.flags & NGHTTP2_FLAG_END_STREAM;
        bool allowed = true;
        if (hd.type == NGHTTP2_SETTINGS && hd.flags & NGHTTP2_FLAG_ACK) me.has_begun_ = true;
        switch (hd.type) {
            case NGHTTP2_HEADERS:
                if (Call* found = call(session, hd.stream_id)) {
                    found->half_closed = ends;
                    if (frame->headers.cat == NGHTTP2_HCAT_REQUEST) me.headers_done(*found);
                    if (ends) me.half_close(*found);
                }
                break;
            case NGHTTP2_DATA:
                if (hd.length == 0 && !ends) {
                    allowed = me.controls_.take(me.host_.limits.controls_per_second, me.host_.now);
                }
                if (Call* found = call(session, hd.stream_id); found && ends) me.half_close(*found);
                break;
            case NGHTTP2_RST_STREAM:
            case NGHTTP2_WINDOW_UPDATE:
                break;
            default:
                allowed = me.controls_.take(me.host_.limits.controls_per_second, me.host_.now);
        }
        if (!allowed) nghttp2_session_terminate_session(session, NGHTTP2_ENHANCE_YOUR_CALM);
        return 0;
    }

    static int data(nghttp2_session* session, std::uint8_t, std::int32_t stream,
                    const std::uint8_t* bytes, std::size_t size, void* user) {
        if (Call* found = call(session, stream))
            self(user).data(*found, {reinterpret_cast<const char*>(bytes), size});
        return 0;
    }

    static int stream_close(nghttp2_session* session, std::int32_t stream, std::uint32_t error,
                            void* user) {
        Session& me = self(user);
        if (Call* found = call(session, stream)) me.close(*found);
        // whichever side resets: a peer can make this one do it
        if (error != NGHTTP2_NO_ERROR &&
            !me.resets_.take(me.host_.limits.resets_per_second, me.host_.now))
            nghttp2_session_terminate_session(session, NGHTTP2_ENHANCE_YOUR_CALM);
        return 0;
    }

    // Streams that the library refuses by itself close without a word.
    static int invalid_frame(nghttp2_session* session, const nghttp2_frame*, int, void* user) {
        Session& me = self(user);
        if (!me.resets_.take(me.host_.limits.resets_per_second, me.host_.now))
            nghttp2_session_terminate_session(session, NGHTTP2_ENHANCE_YOUR_CALM);
        return 0;
    }

    // The rest of a request that is answered is not wanted. A reset that is submitted earlier
    // would overtake the answer.
    static int sent(nghttp2_session* session, const nghttp2_frame* frame, void*) {
        if (frame->hd.type != NGHTTP2_HEADERS || !(frame->hd.flags & NGHTTP2_FLAG_END_STREAM))
            return 0;
        const Call* found = call(session, frame->hd.stream_id);
        if (found && !found->half_closed)
            nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, found->stream, NGHTTP2_NO_ERROR);
        return 0;
    }

    static ssize_t read(nghttp2_session*, std::int32_t, std::uint8_t* to, std::size_t size,
                        std::uint32_t* flags, nghttp2_data_source* source, void* user) {
        Call& call = *static_cast<Call*>(source->ptr);
        const std::size_t n = std::min(size, call.out.size() - call.sent);
        std::memcpy(to, call.out.data() + call.sent, n);
        call.sent += n;
        if (call.sent < call.out.size()) return static_cast<ssize_t>(n);
        if (call.last) {
            *flags |= NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM;
            self(user).submit_trailers(call);
            return static_cast<ssize_t>(n);
        }
        call.out.clear();
        call.sent = 0;
        return n ? static_cast<ssize_t>(n) : ssize_t{NGHTTP2_ERR_DEFERRED};
    }

    static nghttp2_session_callbacks* all() {
        static const auto deleter = [](nghttp2_session_callbacks* p) {
            nghttp2_session_callbacks_del(p);
        };
        static const std::unique_ptr<nghttp2_session_callbacks, decltype(deleter)> callbacks(
            [] {
                nghttp2_session_callbacks* made = nullptr;
                if (nghttp2_session_callbacks_new(&made) != 0) throw std::bad_alloc();
                nghttp2_session_callbacks_set_on_begin_headers_callback(made, &begin_headers);
                nghttp2_session_callbacks_set_on_header_callback(made, &header);
                nghttp2_session_callbacks_set_on_frame_recv_callback(made, &frame);
                nghttp2_session_callbacks_set_on_data_chunk_recv_callback(made, &data);
                nghttp2_session_callbacks_set_on_frame_send_callback(made, &sent);
                nghttp2_session_callbacks_set_on_stream_close_callback(made, &stream_close);
                nghttp2_session_callbacks_set_on_invalid_frame_recv_callback(made, &invalid_frame);
                return made;
            }(),
            deleter);
        return callbacks.get();
    }
};

nghttp2_session_callbacks* session_callbacks() { return Callbacks::all(); }

nghttp2_data_provider reply_body(Call& call) {
    nghttp2_data_provider body;
    body.source.ptr = &call;
    body.read_callback = &Callbacks::read;
    return body;
}

}  // namespace proteus

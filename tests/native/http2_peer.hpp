// A gRPC client by libnghttp2 without a socket, for the tests of the listener.
#pragma once

#include <nghttp2/nghttp2.h>

#include <cstring>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "fixture.hpp"

namespace proteus::fixture {

inline std::string framed(std::string_view message, char flag = 0) {
    std::string out(5, flag);
    for (std::size_t i = 1; i < 5; ++i) out[i] = static_cast<char>(message.size() >> (8 * (4 - i)));
    return out + std::string(message);
}

struct Response {
    std::map<std::string, std::string> fields;  // headers and trailers
    std::string body;
    bool is_closed = false;
    std::uint32_t error = 0;

    int status() const {
        const auto found = fields.find("grpc-status");
        return found == fields.end() ? -1 : std::stoi(found->second);
    }
};

class Peer {
  public:
    using Fields = std::vector<std::pair<std::string, std::string>>;

    explicit Peer(std::int32_t window = 0) {
        nghttp2_session_callbacks* callbacks = nullptr;
        CHECK(nghttp2_session_callbacks_new(&callbacks) == 0);
        nghttp2_session_callbacks_set_on_header_callback(callbacks, &on_header);
        nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, &on_data);
        nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, &on_close);
        nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, &on_frame);
        CHECK(nghttp2_session_client_new(&session_, callbacks, this) == 0);
        nghttp2_session_callbacks_del(callbacks);
        const nghttp2_settings_entry settings[] = {
            {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, static_cast<std::uint32_t>(window)}};
        nghttp2_submit_settings(session_, NGHTTP2_FLAG_NONE, settings, window ? 1 : 0);
    }
    ~Peer() { nghttp2_session_del(session_); }
    Peer(const Peer&) = delete;
    Peer& operator=(const Peer&) = delete;

    // Opens a stream that sends `body`, and ends it unless told otherwise.
    std::int32_t call(const std::string& path, std::string body, const Fields& more = {},
                      bool ends = true, const std::string& type = "application/grpc",
                      const std::string& method = "POST") {
        Fields fields{{":method", method}, {":scheme", "http"},    {":authority", "localhost"},
                      {":path", path},     {"content-type", type}, {"te", "trailers"}};
        fields.insert(fields.end(), more.begin(), more.end());
        std::vector<nghttp2_nv> entries;
        for (auto& [name, value] : fields)
            entries.push_back({reinterpret_cast<std::uint8_t*>(name.data()),
                               reinterpret_cast<std::uint8_t*>(value.data()), name.size(),
                               value.size(), NGHTTP2_NV_FLAG_NONE});
        nghttp2_data_provider provider;
        provider.source.ptr = this;
        provider.read_callback = &on_read;
        const std::int32_t stream = nghttp2_submit_request(session_, nullptr, entries.data(),
                                                           entries.size(), &provider, nullptr);
        CHECK(stream > 0);
        requests_[stream] = {std::move(body), 0, ends};
        responses[stream] = {};
        return stream;
    }

    void more(std::int32_t stream, std::string_view bytes, bool ends) {
        requests_[stream].body += bytes;
        requests_[stream].ends = ends;
        nghttp2_session_resume_data(session_, stream);
    }

    void cancel(std::int32_t stream) {
        nghttp2_submit_rst_stream(session_, NGHTTP2_FLAG_NONE, stream, NGHTTP2_CANCEL);
    }

    void ping() { nghttp2_submit_ping(session_, NGHTTP2_FLAG_NONE, nullptr); }

    std::string outgoing() {
        std::string out;
        const std::uint8_t* data = nullptr;
        for (ssize_t size; (size = nghttp2_session_mem_send(session_, &data)) > 0;)
            out.append(reinterpret_cast<const char*>(data), static_cast<std::size_t>(size));
        return out;
    }

    void incoming(std::string_view bytes) {
        CHECK(nghttp2_session_mem_recv(session_,
                                       reinterpret_cast<const std::uint8_t*>(bytes.data()),
                                       bytes.size()) >= 0);
    }

    std::map<std::int32_t, Response> responses;
    bool has_goaway = false;
    std::uint32_t goaway = 0;
    int pongs = 0;

  private:
    struct Outgoing {
        std::string body;
        std::size_t sent;
        bool ends;
    };

    static Peer& self(void* user) { return *static_cast<Peer*>(user); }
    static int on_header(nghttp2_session*, const nghttp2_frame* frame, const std::uint8_t* name,
                         std::size_t name_size, const std::uint8_t* value, std::size_t value_size,
                         std::uint8_t, void* user) {
        self(user)
            .responses[frame->hd.stream_id]
            .fields[{reinterpret_cast<const char*>(name), name_size}] = {
            reinterpret_cast<const char*>(value), value_size};
        return 0;
    }
    static int on_data(nghttp2_session*, std::uint8_t, std::int32_t stream,
                       const std::uint8_t* data, std::size_t size, void* user) {
        self(user).responses[stream].body.append(reinterpret_cast<const char*>(data), size);
        return 0;
    }
    static int on_close(nghttp2_session*, std::int32_t stream, std::uint32_t error, void* user) {
        self(user).responses[stream].is_closed = true;
        self(user).responses[stream].error = error;
        return 0;
    }
    static int on_frame(nghttp2_session*, const nghttp2_frame* frame, void* user) {
        if (frame->hd.type == NGHTTP2_GOAWAY) {
            self(user).has_goaway = true;
            self(user).goaway = frame->goaway.error_code;
        }
        if (frame->hd.type == NGHTTP2_PING && frame->hd.flags & NGHTTP2_FLAG_ACK)
            ++self(user).pongs;
        return 0;
    }
    static ssize_t on_read(nghttp2_session*, std::int32_t stream, std::uint8_t* to,
                           std::size_t size, std::uint32_t* flags, nghttp2_data_source*,
                           void* user) {
        Outgoing& request = self(user).requests_[stream];
        const std::size_t n = std::min(size, request.body.size() - request.sent);
        std::memcpy(to, request.body.data() + request.sent, n);
        request.sent += n;
        if (request.sent == request.body.size() && request.ends) {
            *flags |= NGHTTP2_DATA_FLAG_EOF;
        } else if (n == 0) {
            return NGHTTP2_ERR_DEFERRED;
        }
        return static_cast<ssize_t>(n);
    }

    nghttp2_session* session_ = nullptr;
    std::map<std::int32_t, Outgoing> requests_;
};

}  // namespace proteus::fixture

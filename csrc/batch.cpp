#include "batch.hpp"

#include <algorithm>
#include <utility>

namespace proteus {
namespace {

std::int64_t nanoseconds(Clock::duration duration) {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(duration).count();
}

std::size_t text_tokens(std::size_t bytes, std::size_t most) {
    const std::size_t tokens = std::max<std::size_t>((bytes + 3) / 4, 1);
    return most == 0 ? tokens : std::min(tokens, most);
}

// Rows of the entries that share mode and guarantee; for a backend that decides, also their kind.
struct Group {
    Mode mode;
    Guarantee guarantee;
    bool of_prompts;
    std::vector<std::size_t> entries;
    std::size_t rows = 0;
};

std::vector<Group> group_entries(const std::vector<const Query*>& queries, Mode default_mode,
                                 bool by_kind) {
    std::vector<Group> groups;
    for (std::size_t i = 0; i < queries.size(); ++i) {
        const Mode mode = queries[i]->mode.value_or(default_mode);
        const Guarantee guarantee = queries[i]->guarantee;
        const bool of_prompts = by_kind && !queries[i]->prompts.empty();
        auto group = std::find_if(groups.begin(), groups.end(), [&](const Group& g) {
            return g.mode == mode && g.guarantee == guarantee && g.of_prompts == of_prompts;
        });
        if (group == groups.end())
            group = groups.insert(group, {mode, guarantee, of_prompts, {}, 0});
        group->entries.push_back(i);
        group->rows += queries[i]->rows;
    }
    return groups;
}

// Flat arguments and results of one group.
struct GroupBuffers {
    std::vector<float> x;
    std::vector<double> tau;
    std::vector<std::uint64_t> available;
    Answer answer;

    void resize(std::size_t rows, std::size_t candidates) {
        available.resize(rows);
        tau.resize(rows);
        answer.choice.resize(rows);
        answer.mu.resize(rows);
        answer.score.resize(rows);
        answer.status.resize(rows);
        answer.certified_floor.resize(rows);
        answer.scores.resize(rows * candidates);
    }
};

template <typename T>
std::vector<T> part(const std::vector<T>& from, std::size_t first, std::size_t count) {
    return {from.begin() + first, from.begin() + first + count};
}

Answer answer_part(const Answer& from, std::size_t first, std::size_t rows, std::size_t k) {
    Answer answer;
    answer.choice = part(from.choice, first, rows);
    answer.mu = part(from.mu, first, rows);
    answer.score = part(from.score, first, rows);
    answer.status = part(from.status, first, rows);
    answer.certified_floor = part(from.certified_floor, first, rows);
    if (!from.scores.empty()) {
        answer.scores = part(from.scores, first * k, rows * k);
        answer.candidates = k;
    }
    return answer;
}

void fill_inputs(const Snapshot& snapshot, const Group& group,
                 const std::vector<const Query*>& queries, GroupBuffers& buffers) {
    const std::size_t dim = snapshot.input_dim;
    buffers.x.resize(group.of_prompts ? 0 : group.rows * dim);
    buffers.resize(group.rows, snapshot.candidates);
    std::size_t row = 0;
    for (const std::size_t entry : group.entries) {
        const Query& query = *queries[entry];
        std::copy(query.x.begin(), query.x.end(), buffers.x.begin() + row * dim);
        for (std::size_t r = 0; r < query.rows; ++r, ++row) {
            buffers.tau[row] = query.tau.size() == 1 ? query.tau[0] : query.tau[r];
            buffers.available[row] = query.available;
            if (!query.texts.empty())
                snapshot.options.encoder->encode(query.texts[r], buffers.x.data() + row * dim);
        }
    }
}

std::vector<std::string_view> prompts_of(const std::vector<const Query*>& queries,
                                         const std::vector<std::size_t>& entries) {
    std::vector<std::string_view> texts;
    for (const std::size_t entry : entries)
        texts.insert(texts.end(), queries[entry]->prompts.begin(), queries[entry]->prompts.end());
    return texts;
}

// The prompts of all groups through the backend, and their rows to where each group has them. An
// entry above the token budget goes in parts of at most that, and stops once it is of no use.
void encode_prompts(const Backend& backend, const TokenLimits& limits,
                    const std::vector<Group>& groups, const std::vector<const Query*>& queries,
                    std::size_t dim, const std::function<bool()>& wanted,
                    std::vector<GroupBuffers>& buffers) {
    std::vector<std::string_view> texts;
    for (const Group& group : groups) {
        const auto more = prompts_of(queries, group.entries);
        texts.insert(texts.end(), more.begin(), more.end());
    }
    std::vector<float> rows(texts.size() * dim);
    for (std::size_t first = 0, last = 0; first < texts.size(); first = last) {
        if (first > 0 && !wanted())
            throw DeadlinePassed("deadline_s: expected time to encode every text, got too little");
        std::size_t tokens = 0;
        do {
            tokens += text_tokens(texts[last++].size(), limits.text);
        } while (last < texts.size() &&
                 (limits.budget == 0 ||
                  tokens + text_tokens(texts[last].size(), limits.text) <= limits.budget));
        backend.encode(std::span(texts).subspan(first, last - first), dim,
                       rows.data() + first * dim);
    }
    auto from = rows.begin();
    for (std::size_t g = 0; g < groups.size(); ++g) {
        auto to = buffers[g].x.begin();
        for (const std::size_t entry : groups[g].entries) {
            const auto size = static_cast<std::ptrdiff_t>(queries[entry]->prompts.size() * dim);
            std::copy(from, from + size, to);
            from += size;
            to += static_cast<std::ptrdiff_t>(queries[entry]->rows * dim);
        }
    }
}

void decide_group(const Snapshot& snapshot, const Backend& backend, const Group& group,
                  const std::vector<const Query*>& queries, GroupBuffers& buffers) {
    Request request;
    request.x = group.of_prompts ? nullptr : buffers.x.data();
    request.rows = group.rows;
    request.tau = buffers.tau.data();
    request.tau_stride = 1;
    request.mode = group.mode;
    request.guarantee = group.guarantee;
    request.available = buffers.available.data();
    request.available_stride = 1;
    Answer& out = buffers.answer;
    if (backend.route) {
        std::vector<std::string_view> texts;
        if (group.of_prompts) texts = prompts_of(queries, group.entries);
        backend.route(texts, request, snapshot.input_dim, out);
        return;
    }
    decide(snapshot, request,
           {out.choice.data(), out.mu.data(), out.score.data(), out.status.data(),
            out.certified_floor.data(), nullptr, out.scores.data()});
}

}  // namespace

std::size_t count_tokens(const Query& query, const TokenLimits& limits) {
    std::size_t tokens = 0;
    for (const std::string& prompt : query.prompts)
        tokens += text_tokens(prompt.size(), limits.text);
    return tokens;
}

void check(const Query& query, const Snapshot& snapshot, const Backend& backend) {
    if (query.mode == Mode::kPolicy && !snapshot.policy)
        throw std::invalid_argument(
            "mode: expected \"dual\" (the checkpoint has no policy), got \"policy\"");
    if (!query.prompts.empty()) {
        if (!backend.takes_prompts())
            throw std::invalid_argument("prompts: expected none without a backend, got some");
    } else if (!query.texts.empty()) {
        if (!snapshot.options.encoder)
            throw std::invalid_argument(
                "texts: expected None (the checkpoint has no hash encoder), got texts");
    } else if (query.x.size() != query.rows * snapshot.input_dim) {
        throw std::invalid_argument("x: expected shape (" + std::to_string(query.rows) + ", " +
                                    std::to_string(snapshot.input_dim) + "), got " +
                                    std::to_string(query.x.size()) + " values");
    }
}

std::vector<Answer> compute(const Snapshot& snapshot, const Backend& backend,
                            const TokenLimits& limits, const std::vector<const Query*>& queries,
                            const std::function<bool()>& wanted, BatchTimes& times) {
    const auto begin = Clock::now();
    const auto groups = group_entries(queries, snapshot.options.default_mode, bool(backend.route));
    std::vector<GroupBuffers> buffers(groups.size());
    for (std::size_t g = 0; g < groups.size(); ++g)
        fill_inputs(snapshot, groups[g], queries, buffers[g]);
    if (backend.encode && !backend.route)
        encode_prompts(backend, limits, groups, queries, snapshot.input_dim, wanted, buffers);
    const auto encoded = Clock::now();
    for (std::size_t g = 0; g < groups.size(); ++g)
        decide_group(snapshot, backend, groups[g], queries, buffers[g]);
    times = {nanoseconds(encoded - begin), nanoseconds(Clock::now() - encoded)};
    std::vector<Answer> answers(queries.size());
    for (std::size_t g = 0; g < groups.size(); ++g) {
        std::size_t row = 0;
        for (const std::size_t i : groups[g].entries) {
            answers[i] = answer_part(buffers[g].answer, row, queries[i]->rows, snapshot.candidates);
            answers[i].encode_ns = times.encode_ns;
            answers[i].decide_ns = times.decide_ns;
            answers[i].version = snapshot.options.version;
            row += queries[i]->rows;
        }
    }
    return answers;
}

}  // namespace proteus

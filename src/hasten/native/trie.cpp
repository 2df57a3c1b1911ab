// The vectorised node transition on a CPU: for each request, the best `most` of the children of its beams, in one call.
//
// A step reads little, but each read depends on the one before: a node's first edge, the edge's token and child, the token's log-probability.
// So rows are walked twice, first only to ask for what the second walk will read. Scores of a node's children are computed in blocks, which
// compilers turn into gathers, and only those above the worst kept one are looked at singly.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr int BLOCK = 64;
constexpr int32_t DEAD = std::numeric_limits<int32_t>::min();

struct Index {
  const int32_t *first, *next;
  const void *tokens, *table;
  const int16_t* lengths;
  int32_t base, width, size;
  int length(int32_t row) const { return lengths ? lengths[row] : width; }
};

struct Filter {  // bits of the nodes and of the rows that a request may use; none: all
  const uint32_t *nodes = nullptr, *rows = nullptr;
  bool operator()(int32_t state) const {
    if (!nodes) return true;
    const uint32_t at = state >= 0 ? state : ~state;
    return (state >= 0 ? nodes : rows)[at >> 5] >> (at & 31) & 1;
  }
};

inline Filter of(const Filter* filters, int i) { return filters ? filters[i] : Filter{}; }

template <class Real>
struct Found {
  Real score;
  int32_t parent, token, state;
};

template <class Real>
struct Best {  // of `most` candidates seen in order, those of the highest scores, the earlier of equal ones
  std::vector<Found<Real>> heap;  // its order breaks ties by what comes first, for candidates come in that order: parent, then token
  size_t most;
  Real least = -std::numeric_limits<Real>::infinity();
  explicit Best(size_t n) : most(n) { heap.reserve(n); }
  static bool better(const Found<Real>& a, const Found<Real>& b) {
    return a.score != b.score ? a.score > b.score : a.parent != b.parent ? a.parent < b.parent : a.token < b.token;
  }
  void add(const Found<Real>& f) {
    if (heap.size() == most) {
      std::pop_heap(heap.begin(), heap.end(), better);
      heap.back() = f;
    } else {
      heap.push_back(f);
    }
    std::push_heap(heap.begin(), heap.end(), better);
    if (heap.size() == most) least = heap.front().score;
  }
};

template <class Token, class Real>
void expand(const Index& x, const Real* logp, int32_t state, int parent, Real sum, const Filter& filter, Best<Real>& best) {
  const Token* tokens = static_cast<const Token*>(x.tokens);
  Real scores[BLOCK];
  for (int32_t at = x.first[state], end = x.first[state + 1]; at < end; at += BLOCK) {
    const int n = std::min(BLOCK, end - at);
    for (int k = 0; k < n; k++) scores[k] = sum + logp[static_cast<int32_t>(tokens[at + k]) + x.base];
    bool some = false;
    for (int k = 0; k < n; k++) some |= scores[k] > best.least;
    if (!some) continue;
    for (int k = 0; k < n; k++)
      if (scores[k] > best.least && filter(x.next[at + k])) best.add({scores[k], parent, static_cast<int32_t>(tokens[at + k]) + x.base, x.next[at + k]});
  }
}

template <class Token, class Real>
void step(const Index& x, const Real* logp, int64_t stride, int requests, int beams, int most, const int32_t* states, const int32_t* depths,
          const Real* sums, const Filter* filters, Real* scores, int64_t* parents, int64_t* tokens, int32_t* follows) {
  const Token* edge = static_cast<const Token*>(x.tokens);
  const Token* table = static_cast<const Token*>(x.table);
  const int rows = requests * beams;
  for (int r = 0; r < rows; r++) {
    const int32_t s = states[r];
    if (s >= 0) __builtin_prefetch(x.first + s);
    else if (s != DEAD) __builtin_prefetch(table + static_cast<int64_t>(~s) * x.width);
  }
  for (int r = 0; r < rows; r++)
    if (states[r] >= 0) {
      __builtin_prefetch(edge + x.first[states[r]]);
      __builtin_prefetch(x.next + x.first[states[r]]);
    }
  for (int q = 0; q < requests; q++) {
    Best<Real> best(most);
    for (int b = 0; b < beams; b++) {
      const int r = q * beams + b;
      const int32_t s = states[r];
      const Real sum = sums[r], *row = logp + r * stride;
      if (s == DEAD || !(sum > -std::numeric_limits<Real>::infinity())) continue;
      if (s >= 0) {
        expand<Token>(x, row, s, b, sum, of(filters, q), best);
      } else if (depths[q] >= x.length(~s)) {
        if (sum > best.least) best.add({sum, b, -1, s});
      } else {
        const int32_t token = static_cast<int32_t>(table[static_cast<int64_t>(~s) * x.width + depths[q]]) + x.base;
        if (sum + row[token] > best.least && of(filters, q)(s)) best.add({sum + row[token], b, token, s});
      }
    }
    std::sort_heap(best.heap.begin(), best.heap.end(), Best<Real>::better);
    for (int i = 0; i < most; i++) {
      const bool live = i < static_cast<int>(best.heap.size());
      const Found<Real> f = live ? best.heap[i] : Found<Real>{-std::numeric_limits<Real>::infinity(), 0, -1, DEAD};
      const int o = q * most + i;
      scores[o] = f.score, parents[o] = f.parent, tokens[o] = f.token, follows[o] = f.state;
    }
  }
}

template <class Token>
void mask(const Index& x, int rows, const int32_t* states, const int32_t* depths, const Filter* filters, uint8_t* out, int64_t vocabulary) {
  const Token* edge = static_cast<const Token*>(x.tokens);
  const Token* table = static_cast<const Token*>(x.table);
  for (int r = 0; r < rows; r++) {
    const int32_t s = states[r];
    uint8_t* row = out + r * vocabulary;
    std::fill(row, row + vocabulary, 0);
    if (s >= 0) {
      for (int32_t e = x.first[s]; e < x.first[s + 1]; e++) row[static_cast<int32_t>(edge[e]) + x.base] = of(filters, r)(x.next[e]);
    } else if (s != DEAD && depths[r] < x.length(~s)) {
      row[static_cast<int32_t>(table[static_cast<int64_t>(~s) * x.width + depths[r]]) + x.base] = of(filters, r)(s);
    }
  }
}

template <class Token>
void walk(const Index& x, int rows, int32_t* states, int32_t* depths, const int64_t* given, int64_t stride, int n) {
  const Token* edge = static_cast<const Token*>(x.tokens);
  const Token* table = static_cast<const Token*>(x.table);
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < n && states[r] != DEAD; i++) {
      const int64_t token = given[r * stride + i] - x.base;
      int32_t& s = states[r];
      if (token < 0 || token > std::numeric_limits<Token>::max()) {
        s = DEAD;
      } else if (s >= 0) {
        const Token *a = edge + x.first[s], *b = edge + x.first[s + 1], *found = std::lower_bound(a, b, static_cast<Token>(token));
        s = found != b && *found == token ? x.next[found - edge] : DEAD;
      } else if (depths[r] >= x.length(~s) || table[static_cast<int64_t>(~s) * x.width + depths[r]] != token) {
        s = DEAD;
      }
      depths[r]++;
    }
}

template <class Call>
void by_size(int size, Call&& call) {
  if (size == 1) call(uint8_t{});
  else if (size == 2) call(uint16_t{});
  else call(uint32_t{});
}

}  // namespace

extern "C" {

void* hasten_trie(const int32_t* first, const void* tokens, const int32_t* next, const void* table, const int16_t* lengths, int base, int width, int size) {
  return new Index{first, next, tokens, table, lengths, base, width, size};
}

void hasten_trie_free(void* x) { delete static_cast<Index*>(x); }

// One step. logp [requests * beams, stride], sums [requests * beams] and scores: float, or double if wide; states [requests * beams], depths and
// filters (or null) [requests]. Out, [requests, most], best first: scores, parents (a beam of the request), tokens (-1: the item had ended), states.
void hasten_trie_step(void* handle, const void* logp, int wide, long stride, int requests, int beams, int most, const int32_t* states,
                      const int32_t* depths, const void* sums, const Filter* filters, void* scores, int64_t* parents, int64_t* tokens,
                      int32_t* follows) {
  const Index& x = *static_cast<Index*>(handle);
  by_size(x.size, [&](auto token) {
    using Token = decltype(token);
    if (wide)
      step<Token>(x, static_cast<const double*>(logp), stride, requests, beams, most, states, depths, static_cast<const double*>(sums), filters,
                  static_cast<double*>(scores), parents, tokens, follows);
    else
      step<Token>(x, static_cast<const float*>(logp), stride, requests, beams, most, states, depths, static_cast<const float*>(sums), filters,
                  static_cast<float*>(scores), parents, tokens, follows);
  });
}

// out [n, vocabulary]: 1 where a token may follow.
void hasten_trie_mask(void* handle, int n, const int32_t* states, const int32_t* depths, const Filter* filters, uint8_t* out, long vocabulary) {
  const Index& x = *static_cast<Index*>(handle);
  by_size(x.size, [&](auto token) { mask<decltype(token)>(x, n, states, depths, filters, out, vocabulary); });
}

// Follow n tokens from each state, in place; DEAD where they lead nowhere.
void hasten_trie_walk(void* handle, int rows, int32_t* states, int32_t* depths, const int64_t* given, long stride, int n) {
  const Index& x = *static_cast<Index*>(handle);
  by_size(x.size, [&](auto token) { walk<decltype(token)>(x, rows, states, depths, given, stride, n); });
}
}

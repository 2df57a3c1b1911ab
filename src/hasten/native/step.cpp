// One decode step of a Llama-like model in one call: embedding, layers over a ragged cache, output layer. Also its linear layers alone.
//
// A step of a small batch is bound by the bytes of the weights, once read; so weights are packed in the order in which they are read, layers of
// one input are joined, what follows a product (bias, residual, activation) is done on its accumulators, and threads meet at a spinning
// barrier, not through the operating system. Weights are fp32, or int8 with one scale an output (symmetric), against int8 activations with
// one scale a row: y = (sum_k xq wq) * xs * ws. The integer sums are exact, so every instruction set gives the same numbers. Weights of 4
// bits are wq = step q, with q in -8..7 and one whole step of at most 15 a group of 32 inputs and output (Lin et al. 2024, arXiv:2405.04532),
// so they are int8 weights that are stored in half the bytes: sums stay exact, and tiles read them unpacked.
//
// Packed weights: panels of 32 outputs as two blocks of 16. fp32 block: [k][16]. int8 block: [k/4][16][4], which is what both VNNI's dot
// products and AMX's tiles read; bf16 block: [k/2][16][2], for the same reason. int4 block: [k/8][16][4] bytes, q + 8 of the first four inputs in the low halves, of the next in the high.
#include <immintrin.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

namespace {

constexpr int BLOCK = 16, PANEL = 32, DEPTH = 64;  // outputs of a block, of a panel; int8 inputs are padded to a multiple of DEPTH
constexpr int ROWS = 8;                            // rows that a fp32 or VNNI kernel holds in registers
constexpr int GROUP = 32;                          // int4 inputs of one step

#if defined(__AVX512BF16__)
#define HASTEN_BF16 1
#endif
#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#define HASTEN_AMX 1
#endif

enum Isa { PORTABLE = 0, AVX2 = 1, VNNI = 2, AMX = 3 };

int best_isa() {
#if defined(HASTEN_AMX)
  static const bool amx = syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, tile data
  if (amx) return AMX;
#endif
#if defined(__AVX512VNNI__)
  return VNNI;
#elif defined(__AVX2__)
  return AVX2;
#else
  return PORTABLE;
#endif
}

// --- threads ------------------------------------------------------------------------------------------------------------------

inline void pause_a_little(int turn) {
  if (turn < 4000) {
#if defined(__x86_64__)
    _mm_pause();
#endif
  } else {
    std::this_thread::yield();  // the machine is busy: let the one we wait for run
  }
}

struct Team {  // `run(work)` calls work(thread) on every thread, the caller's included; `meet` is a barrier inside
  int size;
  std::vector<std::thread> helpers;
  std::atomic<int> round{0}, left{0}, arrived{0}, phase{0};
  std::atomic<bool> stop{false};
  void (*call)(void*, int) = nullptr;
  void* context = nullptr;

  explicit Team(int n) : size(n) {
    for (int i = 1; i < n; i++) helpers.emplace_back([this, i] { serve(i); });
  }
  ~Team() {
    stop = true;
    round.fetch_add(1);
    round.notify_all();
    for (auto& t : helpers) t.join();
  }
  void serve(int id) {
    for (int seen = 0;;) {
      for (int turn = 0; round.load(std::memory_order_acquire) == seen && turn < 3000; turn++) pause_a_little(turn);
      round.wait(seen, std::memory_order_acquire);  // sleeps only after having spun for a while
      seen = round.load(std::memory_order_acquire);
      if (stop) return;
      call(context, id);
      left.fetch_sub(1, std::memory_order_release);
    }
  }
  template <class F>
  void run(F& work) {
    if (size == 1) return work(0);
    context = &work;
    call = [](void* f, int id) { (*static_cast<F*>(f))(id); };
    left.store(size - 1);
    round.fetch_add(1, std::memory_order_release);
    round.notify_all();
    work(0);
    for (int turn = 0; left.load(std::memory_order_acquire); turn++) pause_a_little(turn);
  }
  void meet() {
    if (size == 1) return;
    int now = phase.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      arrived.store(0, std::memory_order_relaxed);
      phase.store(now + 1, std::memory_order_release);
    } else {
      for (int turn = 0; phase.load(std::memory_order_acquire) == now; turn++) pause_a_little(turn);
    }
  }
};

struct Range {
  int begin, end;
};

inline Range share(int n, int thread, int threads) {
  return {int((long)n * thread / threads), int((long)n * (thread + 1) / threads)};
}

// --- weights --------------------------------------------------------------------------------------------------------------------

// Weights of many layers lie in one stretch of huge pages, where the system gives them: a step reads all of them, and looking up a small page
// each 4 KiB takes up to a third of the time of a step of one row.
struct Stretch {
  static constexpr size_t PAGE = 2 << 20, SIZE = 32 << 20;
  std::shared_ptr<char> memory;
  size_t size = 0, used = 0;

  explicit Stretch(size_t bytes = 0) : size((bytes + PAGE - 1) / PAGE * PAGE) {
    if (!size) return;
    memory.reset(static_cast<char*>(std::aligned_alloc(PAGE, size)), std::free);
    if (!memory) throw std::bad_alloc();
    madvise(memory.get(), size, MADV_HUGEPAGE);  // refused: then the pages are small
  }
  char* take(size_t bytes) { return memory.get() + std::exchange(used, used + bytes); }
};

class Memory {  // zeros, for as long as this lives
  std::vector<std::shared_ptr<char>> parts;

 public:
  template <class T>
  T* reserve(size_t n) {
    static std::mutex one;
    static Stretch shared;
    std::lock_guard<std::mutex> hold(one);
    size_t bytes = (n * sizeof(T) + 63) / 64 * 64;
    Stretch own;
    if (bytes > Stretch::SIZE / 4)
      own = Stretch(bytes);
    else if (shared.size - shared.used < bytes)
      shared = Stretch(Stretch::SIZE);
    Stretch& from = own.size ? own : shared;
    parts.push_back(from.memory);
    return reinterpret_cast<T*>(std::memset(from.take(bytes), 0, bytes));
  }
};

struct Linear {
  int n, k, panels, depth;  // outputs, inputs; panels of 32 outputs; inputs as stored
  int bits;                 // of a weight: 32, 16 (bf16), 8 or 4
  float* w = nullptr;
  int8_t* q = nullptr;
  uint16_t* b = nullptr;
  uint8_t* halves = nullptr;  // int4, two a byte
  int8_t* step = nullptr;     // int4: [block][depth / GROUP][16]
  float *scale = nullptr, *bias = nullptr;
  int32_t* sum = nullptr;  // of each output's int8 weights, to undo the offset of unsigned activations
  Memory memory = {};      // where all of them lie
  bool rounds() const { return bits < 32; }  // its inputs, to bf16 or int8
  int row() const { return bits == 16 ? 2 * depth : depth; }  // bytes of a row of rounded inputs
  int groups() const { return depth / GROUP; }
};

Linear* started(const float* bias, int n, int k, int bits) {
  auto* l = new Linear{n, k, (n + PANEL - 1) / PANEL, bits < 32 ? (k + DEPTH - 1) / DEPTH * DEPTH : k, bits};
  l->bias = l->memory.reserve<float>(l->panels * PANEL);
  if (bias) std::memcpy(l->bias, bias, n * sizeof(float));
  return l;
}

// q [n][k] in -8..7, step [n][ceil(k / GROUP)] in -15..15, scale [n]
Linear* pack_int4(const int8_t* q, const int8_t* step, const float* scale, const float* bias, int n, int k) {
  Linear* l = started(bias, n, k, 4);
  int padded = l->panels * PANEL, given = (k + GROUP - 1) / GROUP;
  l->halves = l->memory.reserve<uint8_t>((size_t)padded * l->depth / 2);
  l->step = l->memory.reserve<int8_t>((size_t)padded * l->groups());
  l->scale = l->memory.reserve<float>(padded);
  std::memcpy(l->scale, scale, n * sizeof(float));
  for (int o = 0; o < n; o++) {
    size_t block = o / BLOCK;
    for (int g = 0; g < given; g++) l->step[(block * l->groups() + g) * BLOCK + o % BLOCK] = step[(size_t)o * given + g];
    for (int i = 0; i < k; i++)
      l->halves[((block * (l->depth / 8) + i / 8) * BLOCK + o % BLOCK) * 4 + i % 4] |= (q[(size_t)o * k + i] + 8) << (i % 8 / 4 * 4);
  }
  return l;
}

inline uint16_t bf16(float x) {  // to nearest, ties to even
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return (u + 0x7FFF + (u >> 16 & 1)) >> 16;
}

Linear* pack(const float* weight, const float* bias, int n, int k, int bits) {
  Linear* l = started(bias, n, k, bits);
  int padded = l->panels * PANEL;
  if (bits == 16) {
    l->b = l->memory.reserve<uint16_t>((size_t)padded * l->depth);
    for (int o = 0; o < n; o++)
      for (int i = 0; i < k; i++)
        l->b[(((size_t)(o / BLOCK) * (l->depth / 2) + i / 2) * BLOCK + o % BLOCK) * 2 + i % 2] = bf16(weight[(size_t)o * k + i]);
    return l;
  }
  if (bits == 32) {
    l->w = l->memory.reserve<float>((size_t)padded * k);
    for (int o = 0; o < n; o++)
      for (int i = 0; i < k; i++) l->w[((size_t)(o / BLOCK) * k + i) * BLOCK + o % BLOCK] = weight[(size_t)o * k + i];
    return l;
  }
  l->q = l->memory.reserve<int8_t>((size_t)padded * l->depth);
  l->scale = l->memory.reserve<float>(padded);
  l->sum = l->memory.reserve<int32_t>(padded);
  for (int o = 0; o < n; o++) {
    const float* row = weight + (size_t)o * k;
    float most = 0;
    for (int i = 0; i < k; i++) most = std::max(most, std::fabs(row[i]));
    float up = most > 0 ? 127.0f / most : 0;  // the same operations as in Python, so that no tie is rounded otherwise
    l->scale[o] = most / 127.0f;
    for (int i = 0; i < k; i++) {
      int v = (int)std::nearbyint(row[i] * up);
      l->sum[o] += v;
      l->q[(((size_t)(o / BLOCK) * (l->depth / 4) + i / 4) * BLOCK + o % BLOCK) * 4 + i % 4] = (int8_t)v;
    }
  }
  return l;
}

// --- what follows a product -----------------------------------------------------------------------------------------------------

enum After { STORE, ADD, GATE };  // y = v; y += v; y = act(gate) * up, gate and up being the two blocks of a panel
enum Act { SILU = 0, GELU = 1 };   // GELU: the tanh form

// As many numbers side by side as the processor computes with.
#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
typedef float Lanes __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(WIDTH * 4)));

inline Lanes max(Lanes a, Lanes b) { return a > b ? a : b; }
inline Lanes load(const float* x) { return *(const Lanes*)x; }
inline void store(float* x, Lanes v) { *(Lanes*)x = v; }

// e^x to 2 units in the last place, zero below -87. The library's is one call a number.
inline Lanes exp(Lanes x) {
  Lanes t = x * 1.44269504f;
  t = t > 127.0f ? Lanes{} + 127.0f : t < -126.0f ? Lanes{} - 126.0f : t;
  Ints n = __builtin_convertvector(t + (t < 0.0f ? Lanes{} - 0.5f : Lanes{} + 0.5f), Ints);
  Lanes whole = __builtin_convertvector(n, Lanes), r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Lanes y = 1.9875691500e-4f + Lanes{};
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) y = y * r + c;
  y = (y * r * r + r + 1.0f) * (Lanes)((n + 127) << 23);
  return x < -87.0f ? Lanes{} : y;
}

inline Lanes act(Lanes x, int kind) {  // gelu: x (1 + tanh(u)) / 2
  return x / (1.0f + exp(kind == SILU ? -x : -1.5957691216f * (x + 0.044715f * x * x * x)));
}

struct Out {
  float* y;
  long stride;
  int after, act;
};

// values: 32 results of row m and panel p, bias included
inline void put(const Linear& l, const Out& out, int m, int p, const float* v) {
  if (out.after == GATE) {
    float* y = out.y + m * out.stride + p * BLOCK;
    for (int i = 0; i < BLOCK; i += WIDTH) store(y + i, act(load(v + i), out.act) * load(v + BLOCK + i));
    return;
  }
  float* y = out.y + m * out.stride + p * PANEL;
  int n = std::min(PANEL, l.n - p * PANEL);
  if (out.after == ADD)
    for (int i = 0; i < n; i++) y[i] += v[i];
  else
    for (int i = 0; i < n; i++) y[i] = v[i];
}

// --- products, fp32 -------------------------------------------------------------------------------------------------------------

constexpr int ROWS_FP32 = WIDTH == 16 ? 8 : 6;  // by two registers a row: the sums fit

template <int M>
void panel_fp32(const Linear& l, const float* x, long stride, int m0, int p, const Out& out) {
  alignas(64) float v[M][PANEL];
  for (int part = 0; part < PANEL; part += 2 * WIDTH) {  // AVX-512: both blocks at once; else halves or quarters of a block
    int o = part % BLOCK, second = WIDTH == BLOCK ? l.k * BLOCK : WIDTH;
    const float* w = l.w + ((size_t)p * 2 + part / BLOCK) * l.k * BLOCK + o;
    Lanes s[M][2];
    for (int m = 0; m < M; m++) s[m][0] = load(l.bias + p * PANEL + part), s[m][1] = load(l.bias + p * PANEL + part + WIDTH);
    for (int i = 0; i < l.k; i++) {
      Lanes a = load(w + (size_t)i * BLOCK), b = load(w + (size_t)i * BLOCK + second);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        float xi = x[m * stride + i];
        s[m][0] += xi * a;
        s[m][1] += xi * b;
      }
    }
    for (int m = 0; m < M; m++) store(v[m] + part, s[m][0]), store(v[m] + part + WIDTH, s[m][1]);
  }
  for (int m = 0; m < M; m++) put(l, out, m0 + m, p, v[m]);
}

using PanelFp32 = void (*)(const Linear&, const float*, long, int, int, const Out&);
constexpr PanelFp32 PANELS_FP32[ROWS + 1] = {nullptr,       panel_fp32<1>, panel_fp32<2>, panel_fp32<3>, panel_fp32<4>,
                                             panel_fp32<5>, panel_fp32<6>, panel_fp32<7>, panel_fp32<8>};

// --- products, int8 -------------------------------------------------------------------------------------------------------------
// x: [rows][depth] signed; VNNI takes unsigned ones, so it reads x + 128 and subtracts 128 * sum(w).

inline void dequantise(const Linear& l, const int32_t* s, float xs, int m, int p, const Out& out) {
  alignas(64) float v[PANEL];
  const float *scale = l.scale + p * PANEL, *bias = l.bias + p * PANEL;
  for (int i = 0; i < PANEL; i++) v[i] = (float)s[i] * (xs * scale[i]) + bias[i];
  put(l, out, m, p, v);
}

template <int M>
void panel_portable(const Linear& l, const int8_t* x, const float* xs, int m0, int p, const Out& out) {
  const int8_t* w = l.q + (size_t)p * PANEL * l.depth;
  for (int m = 0; m < M; m++) {
    int32_t s[PANEL] = {};
    for (int b = 0; b < 2; b++)
      for (int i = 0; i < l.depth / 4; i++)
        for (int o = 0; o < BLOCK; o++)
          for (int j = 0; j < 4; j++)
            s[b * BLOCK + o] += (int)w[((size_t)b * l.depth / 4 + i) * 64 + o * 4 + j] * x[(size_t)m * l.depth + i * 4 + j];
    dequantise(l, s, xs[m], m0 + m, p, out);
  }
}

#if defined(__AVX2__)
template <int M>
void panel_avx2(const Linear& l, const int8_t* x, const float* xs, int m0, int p, const Out& out) {
  // |w| is unsigned and x takes w's sign. Two products make at most 2 * 127 * 127, which 16 bits hold. 32 bytes of weights = 8 outputs.
  const int8_t* w = l.q + (size_t)p * PANEL * l.depth;
  const __m256i ones = _mm256_set1_epi16(1);
  alignas(64) int32_t sums[M][PANEL];
  for (int part = 0; part < PANEL / 8; part++) {
    const int8_t* block = w + (size_t)(part / 2) * BLOCK * l.depth + (part % 2) * 32;
    __m256i s[M];
    for (int m = 0; m < M; m++) s[m] = _mm256_setzero_si256();
    for (int i = 0; i < l.depth / 4; i++) {
      __m256i wi = _mm256_load_si256((const __m256i*)(block + (size_t)i * 64)), size = _mm256_abs_epi8(wi);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        int32_t four;
        std::memcpy(&four, x + (size_t)m * l.depth + i * 4, 4);
        __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(_mm256_set1_epi32(four), wi));
        s[m] = _mm256_add_epi32(s[m], _mm256_madd_epi16(pairs, ones));
      }
    }
    for (int m = 0; m < M; m++) _mm256_store_si256((__m256i*)(sums[m] + part * 8), s[m]);
  }
  for (int m = 0; m < M; m++) dequantise(l, sums[m], xs[m], m0 + m, p, out);
}
#endif

#if defined(__AVX512VNNI__)
template <int M>
void panel_vnni(const Linear& l, const int8_t* x, const float* xs, int m0, int p, const Out& out) {
  const int8_t* a = l.q + (size_t)p * PANEL * l.depth;
  const int8_t* b = a + (size_t)BLOCK * l.depth;
  const __m512i flip = _mm512_set1_epi8((char)0x80);
  __m512i s[M][2];
  for (int m = 0; m < M; m++)
    for (int h = 0; h < 2; h++) s[m][h] = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(l.sum + p * PANEL + h * BLOCK)), 7);
  for (int i = 0; i < l.depth / 4; i++) {
    __m512i wa = _mm512_load_si512(a + (size_t)i * 64), wb = _mm512_load_si512(b + (size_t)i * 64);
    for (int m = 0; m < M; m++) {
      int32_t four;
      std::memcpy(&four, x + (size_t)m * l.depth + i * 4, 4);
      __m512i xi = _mm512_xor_si512(_mm512_set1_epi32(four), flip);  // + 128, as unsigned
      s[m][0] = _mm512_dpbusd_epi32(s[m][0], xi, wa);
      s[m][1] = _mm512_dpbusd_epi32(s[m][1], xi, wb);
    }
  }
  alignas(64) int32_t sums[PANEL];
  for (int m = 0; m < M; m++) {
    _mm512_store_si512(sums, s[m][0]), _mm512_store_si512(sums + BLOCK, s[m][1]);
    dequantise(l, sums, xs[m], m0 + m, p, out);
  }
}
#endif

#if defined(HASTEN_AMX)
struct alignas(64) Tiles {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

void configure(int m) {  // tiles 0-3: sums [rows][16] of two row groups by two blocks; 4-5: activations; 6-7: weights
  Tiles t;
  int first = std::min(m, 16), second = std::max(1, m - 16);
  for (int i = 0; i < 8; i++) t.bytes[i] = 64;
  t.rows[0] = t.rows[1] = t.rows[4] = first;
  t.rows[2] = t.rows[3] = t.rows[5] = second;
  t.rows[6] = t.rows[7] = 16;
  asm volatile("" ::"r"(&t) : "memory");  // GCC 12 and older believe that 8 of the 64 bytes are read, and may drop the other stores
  _tile_loadconfig(&t);
}

template <bool BF16>
inline void finish(const Linear& l, const int32_t* s, float xs, int m, int p, const Out& out) {
  if (!BF16) return dequantise(l, s, xs, m, p, out);
  alignas(64) float v[PANEL];
  std::memcpy(v, s, sizeof v);
  for (int i = 0; i < PANEL; i++) v[i] += l.bias[p * PANEL + i];
  put(l, out, m, p, v);
}

#define DOT(c, x, w) if constexpr (BF16) _tile_dpbf16ps(c, x, w); else _tile_dpbssd(c, x, w)

// a: the panel's weights, int8 or bf16; x: rows of the same
template <bool BF16>
void panel_amx(const Linear& l, const int8_t* a, const int8_t* x, const float* xs, int m0, int m, int p, const Out& out) {
  const int depth = BF16 ? 2 * l.depth : l.depth;  // bytes
  const int8_t* b = a + (size_t)BLOCK * depth;
  alignas(64) int32_t sums[PANEL][PANEL];
  _tile_zero(0);
  _tile_zero(1);
  if (m > 16) {
    _tile_zero(2);
    _tile_zero(3);
    for (int i = 0; i < depth; i += DEPTH) {
      _tile_loadd(4, x + i, depth);
      _tile_loadd(5, x + (size_t)16 * depth + i, depth);
      _tile_loadd(6, a + (size_t)i * BLOCK, 64);
      DOT(0, 4, 6);
      DOT(2, 5, 6);
      _tile_loadd(7, b + (size_t)i * BLOCK, 64);
      DOT(1, 4, 7);
      DOT(3, 5, 7);
    }
    _tile_stored(2, &sums[16][0], PANEL * 4);
    _tile_stored(3, &sums[16][BLOCK], PANEL * 4);
  } else {
    for (int i = 0; i < depth; i += DEPTH) {
      _tile_loadd(4, x + i, depth);
      _tile_loadd(6, a + (size_t)i * BLOCK, 64);
      DOT(0, 4, 6);
      _tile_loadd(7, b + (size_t)i * BLOCK, 64);
      DOT(1, 4, 7);
    }
  }
  _tile_stored(0, &sums[0][0], PANEL * 4);
  _tile_stored(1, &sums[0][BLOCK], PANEL * 4);
  for (int r = 0; r < m; r++) finish<BF16>(l, sums[r], xs[r], m0 + r, p, out);
}
#endif

using PanelInt8 = void (*)(const Linear&, const int8_t*, const float*, int, int, const Out&);
#define EACH(f) {nullptr, f<1>, f<2>, f<3>, f<4>, f<5>, f<6>, f<7>, f<8>}
constexpr PanelInt8 PANELS_PORTABLE[ROWS + 1] = EACH(panel_portable);
#if defined(__AVX2__)
constexpr PanelInt8 PANELS_AVX2[ROWS + 1] = EACH(panel_avx2);
#endif
#if defined(__AVX512VNNI__)
constexpr PanelInt8 PANELS_VNNI[ROWS + 1] = EACH(panel_vnni);
#endif

const PanelInt8* panels_int8(int isa) {
#if defined(__AVX512VNNI__)
  if (isa >= VNNI) return PANELS_VNNI;
#endif
#if defined(__AVX2__)
  if (isa >= AVX2) return PANELS_AVX2;
#endif
  return PANELS_PORTABLE;
}

// --- products, int4 -------------------------------------------------------------------------------------------------------------
// Sums of q + 8 over a group start at -8 sum(x), which is `offsets` [rows][groups]; times the group's step they join the row's sum.

template <int M>
void panel_portable4(const Linear& l, const int8_t* x, const int32_t* offsets, const float* xs, int m0, int p, const Out& out) {
  for (int m = 0; m < M; m++, x += l.depth, offsets += l.groups()) {
    int32_t sums[PANEL] = {};
    for (int b = 0; b < 2; b++)
      for (int g = 0; g < l.groups(); g++) {
        size_t at = (size_t)(2 * p + b) * l.groups() + g;
        const uint8_t* w = l.halves + at * BLOCK * GROUP / 2;
        for (int o = 0; o < BLOCK; o++) {
          int32_t s = offsets[g];
          for (int i = 0; i < GROUP; i++) s += (w[(i / 8 * BLOCK + o) * 4 + i % 4] >> (i % 8 / 4 * 4) & 15) * x[g * GROUP + i];
          sums[b * BLOCK + o] += s * l.step[at * BLOCK + o];
        }
      }
    dequantise(l, sums, xs[m], m0 + m, p, out);
  }
}

#if defined(__AVX2__)
template <int M>
void panel_avx24(const Linear& l, const int8_t* x, const int32_t* offsets, const float* xs, int m0, int p, const Out& out) {
  // A group's sums fit 16 bits: two of them, over 16 inputs each, make an output's. Each starts at -4 sum(x). 32 bytes = 8 outputs.
  const __m256i low = _mm256_set1_epi8(15);
  alignas(64) int32_t sums[M][PANEL];
  for (int part = 0; part < PANEL / 8; part++) {
    size_t block = 2 * p + part / 2;
    const uint8_t* w = l.halves + block * BLOCK * l.depth / 2 + (part % 2) * 32;
    const int8_t* step = l.step + block * BLOCK * l.groups() + (part % 2) * 8;
    __m256i total[M], s[M];
    for (int m = 0; m < M; m++) total[m] = _mm256_setzero_si256();
    for (int g = 0; g < l.groups(); g++) {
      for (int m = 0; m < M; m++) s[m] = _mm256_set1_epi16((short)(offsets[m * l.groups() + g] / 2));
      for (int i = 0; i < GROUP / 8; i++, w += 64) {
        __m256i both = _mm256_load_si256((const __m256i*)w);
        __m256i first = _mm256_and_si256(both, low), second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
          int32_t four[2];
          std::memcpy(four, x + (size_t)m * l.depth + g * GROUP + i * 8, 8);
          s[m] = _mm256_add_epi16(s[m], _mm256_maddubs_epi16(first, _mm256_set1_epi32(four[0])));
          s[m] = _mm256_add_epi16(s[m], _mm256_maddubs_epi16(second, _mm256_set1_epi32(four[1])));
        }
      }
      __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(step + g * BLOCK)));
      wide = _mm256_blend_epi16(wide, _mm256_slli_epi32(wide, 16), 0xAA);  // the step twice, for both sums
      for (int m = 0; m < M; m++) total[m] = _mm256_add_epi32(total[m], _mm256_madd_epi16(s[m], wide));
    }
    for (int m = 0; m < M; m++) _mm256_store_si256((__m256i*)(sums[m] + part * 8), total[m]);
  }
  for (int m = 0; m < M; m++) dequantise(l, sums[m], xs[m], m0 + m, p, out);
}
#endif

#if defined(__AVX512VNNI__)
inline __m512i steps_of(const int8_t* step) { return _mm512_cvtepi8_epi32(_mm_load_si128((const __m128i*)step)); }

template <int M>
void panel_vnni4(const Linear& l, const int8_t* x, const int32_t* offsets, const float* xs, int m0, int p, const Out& out) {
  const __m512i low = _mm512_set1_epi8(15);
  alignas(64) int32_t sums[M][PANEL];
  for (int b = 0; b < 2; b++) {
    const uint8_t* w = l.halves + (size_t)(2 * p + b) * BLOCK * l.depth / 2;
    const int8_t* step = l.step + (size_t)(2 * p + b) * BLOCK * l.groups();
    __m512i total[M], s[M];
    for (int m = 0; m < M; m++) total[m] = _mm512_setzero_si512();
    for (int g = 0; g < l.groups(); g++) {
      for (int m = 0; m < M; m++) s[m] = _mm512_set1_epi32(offsets[m * l.groups() + g]);
#pragma GCC unroll 4
      for (int i = 0; i < GROUP / 8; i++, w += 64) {
        __m512i both = _mm512_load_si512(w);
        __m512i first = _mm512_and_si512(both, low), second = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        for (int m = 0; m < M; m++) {
          int32_t four[2];
          std::memcpy(four, x + (size_t)m * l.depth + g * GROUP + i * 8, 8);
          s[m] = _mm512_dpbusd_epi32(s[m], first, _mm512_set1_epi32(four[0]));
          s[m] = _mm512_dpbusd_epi32(s[m], second, _mm512_set1_epi32(four[1]));
        }
      }
      // a group's sum fits 16 bits: its low half times the step, its high half times nothing
      __m512i once = _mm512_maskz_mov_epi16(0x55555555, steps_of(step + g * BLOCK));
      for (int m = 0; m < M; m++) total[m] = _mm512_dpwssd_epi32(total[m], s[m], once);
    }
    for (int m = 0; m < M; m++) _mm512_store_si512(sums[m] + b * BLOCK, total[m]);
  }
  for (int m = 0; m < M; m++) dequantise(l, sums[m], xs[m], m0 + m, p, out);
}
#endif

#if defined(HASTEN_AMX)
// A panel as int8: step q = step (q + 8) - 8 step, in bytes, whose products by 16 bits go wrong in nothing but the byte above.
void unpack(const Linear& l, int p, int8_t* to) {
  const __m512i low = _mm512_set1_epi8(15), even = _mm512_set1_epi16(255);
  const __m512i fourfold = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
  const uint8_t* w = l.halves + (size_t)p * PANEL * l.depth / 2;
  const int8_t* step = l.step + (size_t)p * PANEL * l.groups();
  for (int g = 0; g < 2 * l.groups(); g++, step += BLOCK) {
    __m512i wide = steps_of(step), twice = _mm512_mask_mov_epi16(wide, 0xAAAAAAAA, _mm512_slli_epi32(wide, 16));
    __m512i eight = _mm512_and_si512(_mm512_slli_epi16(_mm512_shuffle_epi8(wide, fourfold), 3), _mm512_set1_epi8((char)0xF8));
    for (int i = 0; i < GROUP / 8; i++, w += 64, to += 128) {
      __m512i both = _mm512_load_si512(w), part[2] = {_mm512_and_si512(both, low), _mm512_and_si512(_mm512_srli_epi16(both, 4), low)};
      for (int h = 0; h < 2; h++) {
        __m512i a = _mm512_mullo_epi16(_mm512_and_si512(part[h], even), twice);
        __m512i b = _mm512_mullo_epi16(_mm512_andnot_si512(even, part[h]), twice);
        _mm512_store_si512(to + h * 64, _mm512_sub_epi8(_mm512_ternarylogic_epi32(even, a, b, 0xCA), eight));
      }
    }
  }
}
#endif

using PanelInt4 = void (*)(const Linear&, const int8_t*, const int32_t*, const float*, int, int, const Out&);
constexpr PanelInt4 PANELS_PORTABLE4[ROWS + 1] = EACH(panel_portable4);
#if defined(__AVX2__)
constexpr PanelInt4 PANELS_AVX24[ROWS + 1] = EACH(panel_avx24);
#endif
#if defined(__AVX512VNNI__)
constexpr PanelInt4 PANELS_VNNI4[ROWS + 1] = EACH(panel_vnni4);
#endif

const PanelInt4* panels_int4(int isa) {
#if defined(__AVX512VNNI__)
  if (isa >= VNNI) return PANELS_VNNI4;
#endif
#if defined(__AVX2__)
  if (isa >= AVX2) return PANELS_AVX24;
#endif
  return PANELS_PORTABLE4;
}

// --- products, bf16 -------------------------------------------------------------------------------------------------------------

#if defined(HASTEN_BF16)
template <int M>
void panel_bf16(const Linear& l, const uint16_t* x, int m0, int p, const Out& out) {
  const uint16_t *a = l.b + (size_t)p * PANEL * l.depth, *b = a + (size_t)BLOCK * l.depth;
  __m512 s[M][2];
  for (int m = 0; m < M; m++) s[m][0] = _mm512_loadu_ps(l.bias + p * PANEL), s[m][1] = _mm512_loadu_ps(l.bias + p * PANEL + BLOCK);
  for (int i = 0; i < l.depth; i += 2) {
    auto wa = (__m512bh)_mm512_load_si512(a + (size_t)i * BLOCK), wb = (__m512bh)_mm512_load_si512(b + (size_t)i * BLOCK);
    for (int m = 0; m < M; m++) {
      int32_t two;
      std::memcpy(&two, x + (size_t)m * l.depth + i, 4);
      auto xi = (__m512bh)_mm512_set1_epi32(two);
      s[m][0] = _mm512_dpbf16_ps(s[m][0], wa, xi);
      s[m][1] = _mm512_dpbf16_ps(s[m][1], wb, xi);
    }
  }
  alignas(64) float v[PANEL];
  for (int m = 0; m < M; m++) {
    _mm512_store_ps(v, s[m][0]), _mm512_store_ps(v + BLOCK, s[m][1]);
    put(l, out, m0 + m, p, v);
  }
}

using PanelBf16 = void (*)(const Linear&, const uint16_t*, int, int, const Out&);
constexpr PanelBf16 PANELS_BF16[ROWS + 1] = EACH(panel_bf16);
#endif

// --- products, any ----------------------------------------------------------------------------------------------------------------

// One row of fp32 as int8 with a scale; `depth` numbers are written, zeros behind the k-th.
void quantise(const float* x, int k, int depth, int8_t* q, float* scale) {
  float most = 0;
  for (int i = 0; i < k; i++) most = std::max(most, std::fabs(x[i]));
  float up = most > 0 ? 127.0f / most : 0;
  *scale = most / 127.0f;
  for (int i = 0; i < k; i++) q[i] = (int8_t)(int)std::nearbyint(x[i] * up);
  for (int i = k; i < depth; i++) q[i] = 0;
}

void offsets_of(const int8_t* q, int depth, int32_t* offsets) {
  for (int g = 0; g < depth / GROUP; g++) {
    int32_t sum = 0;
    for (int i = 0; i < GROUP; i++) sum += q[g * GROUP + i];
    offsets[g] = -8 * sum;
  }
}

struct Input {  // rows of a product: fp32, and their int8 form where the weights are whole numbers
  const float* x;
  long stride;
  int8_t* q;
  float* scale;
  int32_t* offsets;

  // Rows [range) as `l` wants them.
  void prepare(const Linear& l, Range rows) const {
    if (!l.rounds()) return;
    for (int r = rows.begin; r < rows.end; r++) {
      int8_t* to = q + (size_t)r * l.row();
      if (l.bits == 16) {
        auto* rounded = (uint16_t*)to;
        for (int i = 0; i < l.depth; i++) rounded[i] = i < l.k ? bf16(x[r * stride + i]) : 0;
        continue;
      }
      quantise(x + r * stride, l.k, l.depth, to, scale + r);
      if (l.bits == 4) offsets_of(to, l.depth, offsets + (size_t)r * l.groups());
    }
  }
};

constexpr int FEW_FOR_TILES = 3;   // from so many rows tiles beat dot products
constexpr int FEW_FOR_TILES4 = 6;  // and pay the unpacking of 4 bits

// Panels [range) of all m rows.
void multiply(const Linear& l, const Input& in, int m, Range range, const Out& out, int isa) {
#if defined(HASTEN_AMX)
  if (l.bits == 4 && isa >= AMX && m >= FEW_FOR_TILES4) {
    static thread_local std::vector<int8_t> room;
    room.resize((size_t)PANEL * l.depth + 64);
    auto* panel = (int8_t*)(((uintptr_t)room.data() + 63) & ~(uintptr_t)63);
    for (int p = range.begin, configured = 0; p < range.end; p++) {
      unpack(l, p, panel);
      for (int m0 = 0; m0 < m; m0 += PANEL) {
        int rows = std::min(PANEL, m - m0);
        if (rows != configured) configure(configured = rows);
        panel_amx<false>(l, panel, in.q + (size_t)m0 * l.depth, in.scale + m0, m0, rows, p, out);
      }
    }
    _tile_release();
    return;
  }
  if ((l.bits == 8 || l.bits == 16) && isa >= AMX && m >= FEW_FOR_TILES) {
    auto panel = l.bits == 8 ? panel_amx<false> : panel_amx<true>;
    const int8_t* weights = l.bits == 8 ? l.q : (const int8_t*)l.b;
    int configured = 0;
    for (int m0 = 0; m0 < m; m0 += PANEL) {
      int rows = std::min(PANEL, m - m0);
      if (rows != configured) configure(configured = rows);
      for (int p = range.begin; p < range.end; p++) 
        panel(l, weights + (size_t)p * PANEL * l.row(), in.q + (size_t)m0 * l.row(), in.scale + m0, m0, rows, p, out);
    }
    _tile_release();
    return;
  }
#endif
  const PanelInt8* kernels = panels_int8(isa);
  const PanelInt4* kernels4 = panels_int4(isa);
  for (int p = range.begin; p < range.end; p++)
    for (int m0 = 0, most = l.rounds() ? ROWS : ROWS_FP32; m0 < m; m0 += most) {
      int rows = std::min(most, m - m0);
      const int8_t* q = in.q + (size_t)m0 * l.row();
#if defined(HASTEN_BF16)
      if (l.bits == 16) {
        PANELS_BF16[rows](l, (const uint16_t*)q, m0, p, out);
        continue;
      }
#endif
      if (l.bits == 4)
        kernels4[rows](l, q, in.offsets + (size_t)m0 * l.groups(), in.scale + m0, m0, p, out);
      else if (l.bits == 8)
        kernels[rows](l, q, in.scale + m0, m0, p, out);
      else
        PANELS_FP32[rows](l, in.x + m0 * in.stride, in.stride, m0, p, out);
    }
}

// --- attention ----------------------------------------------------------------------------------------------------------------

inline float dot(const float* a, const float* b, int n) {
  float s = 0;
  for (int i = 0; i < n; i++) s += a[i] * b[i];
  return s;
}

inline float sum(Lanes x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float s = 0;
  for (int i = 0; i < WIDTH; i++) s += x[i];
  return s;
#endif
}

// scores [groups][n] of one row's queries against n keys. D: registers that a head fills.
template <int D>
void scores_of_row(const float* q, const float* keys, long stride, int n, int groups, float scale, float* scores) {
  for (int g = 0; g < groups; g++) {
    Lanes a[D];
    for (int d = 0; d < D; d++) a[d] = load(q + (g * D + d) * WIDTH) * scale;
#pragma GCC unroll 4
    for (int t = 0; t < n; t++) {
      Lanes s = a[0] * load(keys + t * stride);
      for (int d = 1; d < D; d++) s += a[d] * load(keys + t * stride + d * WIDTH);
      scores[(size_t)g * n + t] = sum(s);
    }
  }
}

template <int D>
void values_of_row(const float* weights, const float* values, long stride, int n, float* y) {
  constexpr int CHAINS = D == 1 ? 4 : D == 2 ? 2 : 1;  // sums that do not wait for each other
  Lanes s[CHAINS][D] = {};
  int t = 0;
  for (; t + CHAINS <= n; t += CHAINS)
    for (int c = 0; c < CHAINS; c++)
      for (int d = 0; d < D; d++) s[c][d] += weights[t + c] * load(values + (t + c) * stride + d * WIDTH);
  for (; t < n; t++)
    for (int d = 0; d < D; d++) s[0][d] += weights[t] * load(values + t * stride + d * WIDTH);
  for (int d = 0; d < D; d++) {
    for (int c = 1; c < CHAINS; c++) s[0][d] += s[c][d];
    store(y + d * WIDTH, s[0][d]);
  }
}

// In place: the softmax of n scores.
void softmax(float* s, int n) {
  float most = -INFINITY, total = 0;
  for (int t = 0; t < n; t++) most = std::max(most, s[t]);
  int whole = n / WIDTH * WIDTH;
  for (int t = 0; t < whole; t += WIDTH) store(s + t, exp(load(s + t) - most));
  float rest[WIDTH] = {};
  std::memcpy(rest, s + whole, (n - whole) * sizeof(float));
  store(rest, exp(load(rest) - most));
  std::memcpy(s + whole, rest, (n - whole) * sizeof(float));
  for (int t = 0; t < n; t++) total += s[t];
  float r = 1.0f / total;
  for (int t = 0; t < n; t++) s[t] *= r;
}

// One query group (the heads that share a key head) of one row against its n keys: softmax(q k) v.
void attend(const float* q, const float* keys, const float* values, long stride, int n, int groups, int dim, float scale, float* scores, float* y) {
  using Scores = void (*)(const float*, const float*, long, int, int, float, float*);
  using Values = void (*)(const float*, const float*, long, int, float*);
  constexpr Scores BY_SIZE[9] = {nullptr, scores_of_row<1>, scores_of_row<2>, scores_of_row<3>, scores_of_row<4>,
                                 nullptr, scores_of_row<6>, nullptr,          scores_of_row<8>};
  constexpr Values ADD_BY_SIZE[9] = {nullptr, values_of_row<1>, values_of_row<2>, values_of_row<3>, values_of_row<4>,
                                     nullptr, values_of_row<6>, nullptr,          values_of_row<8>};
  int size = dim % WIDTH == 0 && dim / WIDTH <= 8 ? dim / WIDTH : 0;
  if (BY_SIZE[size])
    BY_SIZE[size](q, keys, stride, n, groups, scale, scores);
  else
    for (int g = 0; g < groups; g++)
      for (int t = 0; t < n; t++) scores[(size_t)g * n + t] = dot(q + g * dim, keys + t * stride, dim) * scale;
  for (int g = 0; g < groups; g++) {
    float* s = scores + (size_t)g * n;
    softmax(s, n);
    if (BY_SIZE[size]) {
      ADD_BY_SIZE[size](s, values, stride, n, y + g * dim);
      continue;
    }
    for (int i = 0; i < dim; i++) y[g * dim + i] = 0;
    for (int t = 0; t < n; t++)
      for (int i = 0; i < dim; i++) y[g * dim + i] += s[t] * values[t * stride + i];
  }
}

// Many rows of one prompt at once: keys are read once for all, and numbers of 16 queries stand side by side, so that neither keys nor
// sums are turned round. Softmax goes along with the blocks of keys (Milakov & Gimelshein 2018, arXiv:1805.02867).
constexpr int QUERIES = 3 * WIDTH, KEYS = 32;   // of a tile: row x head; of a block
constexpr int AT_ONCE = WIDTH == 16 ? 8 : 4;  // keys, or dimensions, whose sums are in registers
constexpr float MASKED = -1e30f;

struct Tile {  // rows [row, row + count) are positions from `position` of one slot
  int row, count;
  int64_t slot, position;
};

struct Scratch {
  std::vector<float> scores;                        // of one row
  std::vector<float> queries, sums;                 // [dim][QUERIES]
  float block[KEYS][QUERIES], most[QUERIES], total[QUERIES];
};

template <int V>
void scores_of_block(const float* queries, const float* keys, long stride, int n, int dim, float (*out)[QUERIES]) {
  for (int t = 0; t < n; t += AT_ONCE) {
    Lanes s[AT_ONCE][V] = {};
    const float* k[AT_ONCE];
    for (int u = 0; u < AT_ONCE; u++) k[u] = keys + std::min(t + u, n - 1) * stride;
    for (int i = 0; i < dim; i++)
      for (int v = 0; v < V; v++) {
        Lanes q = load(queries + i * QUERIES + v * WIDTH);
#pragma GCC unroll 8
        for (int u = 0; u < AT_ONCE; u++) s[u][v] += k[u][i] * q;
      }
    for (int u = 0; u < AT_ONCE && t + u < n; u++)
      for (int v = 0; v < V; v++) store(out[t + u] + v * WIDTH, s[u][v]);
  }
}

template <int V>
void add_values(const float (*weights)[QUERIES], const float* values, long stride, int n, int dim, const float* shrink, float* sums) {
  for (int i = 0; i < dim; i += AT_ONCE) {
    Lanes s[AT_ONCE][V];
    for (int u = 0; u < AT_ONCE; u++)
      for (int v = 0; v < V; v++) s[u][v] = load(sums + (i + u) * QUERIES + v * WIDTH) * load(shrink + v * WIDTH);
    for (int t = 0; t < n; t++)
      for (int v = 0; v < V; v++) {
        Lanes p = load(weights[t] + v * WIDTH);
#pragma GCC unroll 8
        for (int u = 0; u < AT_ONCE; u++) s[u][v] += values[t * stride + i + u] * p;
      }
    for (int u = 0; u < AT_ONCE; u++)
      for (int v = 0; v < V; v++) store(sums + (i + u) * QUERIES + v * WIDTH, s[u][v]);
  }
}

// scores [n][lanes] of keys from `first` -> their softmax's numerators; what the sums so far must shrink by
void soften(Scratch& s, int lanes, int first, int n, const Tile& tile, int groups, int window, float* shrink) {
  bool edge = first + n - 1 > tile.position || (window && first <= tile.position + tile.count - 1 - window);
  for (int t = 0; edge && t < n; t++)
    for (int j = 0; j < tile.count * groups; j++) {
      long at = tile.position + j / groups, key = first + t;
      if (key > at || (window && key <= at - window)) s.block[t][j] = MASKED;
    }
  for (int j = 0; j < lanes; j += WIDTH) {
    Lanes before = load(s.most + j), most = before, total = load(s.total + j);
    for (int t = 0; t < n; t++) most = max(most, load(s.block[t] + j));
    Lanes less = exp(before - most);
    total *= less;
    for (int t = 0; t < n; t++) {
      Lanes p = exp(load(s.block[t] + j) - most);
      store(s.block[t] + j, p);
      total += p;
    }
    store(s.most + j, most), store(s.total + j, total), store(shrink + j, less);
  }
}

template <int V>
void attend_tile(const Tile& tile, const float* q, long q_stride, const float* keys, const float* values, long stride, int window, int groups,
                 int dim, float scale, Scratch& s, float* y, long y_stride) {
  int all = tile.count * groups, last = (int)tile.position + tile.count, first = window ? std::max(0, (int)tile.position - window + 1) : 0;
  s.queries.assign((size_t)dim * QUERIES, 0.0f);
  s.sums.assign((size_t)dim * QUERIES, 0.0f);
  for (int j = 0; j < QUERIES; j++) s.most[j] = MASKED, s.total[j] = 0;
  for (int j = 0; j < all; j++)
    for (int i = 0; i < dim; i++) s.queries[(size_t)i * QUERIES + j] = q[(j / groups) * q_stride + (j % groups) * dim + i] * scale;
  alignas(64) float shrink[QUERIES];
  for (int t = first; t < last; t += KEYS) {
    int n = std::min(KEYS, last - t);
    scores_of_block<V>(s.queries.data(), keys + t * stride, stride, n, dim, s.block);
    soften(s, V * WIDTH, t, n, tile, groups, window, shrink);
    add_values<V>(s.block, values + t * stride, stride, n, dim, shrink, s.sums.data());
  }
  for (int j = 0; j < all; j++) {
    float r = 1.0f / s.total[j], *to = y + (j / groups) * y_stride + (j % groups) * dim;
    for (int i = 0; i < dim; i++) to[i] = s.sums[(size_t)i * QUERIES + j] * r;
  }
}

// --- the model ------------------------------------------------------------------------------------------------------------------

struct Layer {
  Linear *qkv, *o, *gate_up, *down;
  const float *norm1, *norm2, *qnorm, *knorm;  // the last two may be null
  int window;                                  // 0: none
};

struct Model {
  int width, inner, heads, kv_heads, dim, rotary, act;
  float eps, attention_scale, embedding_scale;
  const float *embedding, *norm;
  Linear* head;  // null: a reward model's score is computed elsewhere
  std::vector<Layer> layers;
  int isa;
  Team* team;
  // work space for `room` rows
  int room = 0;
  std::vector<float> x, h, qkv, attended, gated, xs, cosines;
  std::vector<int8_t> q;
  std::vector<int32_t> offsets;
  std::vector<Scratch> scratch;  // one a thread
};

struct Step {  // what one call works on; arrays of n rows
  int n, outputs;
  const int64_t *ids, *slots, *positions, *which;  // which: rows whose logits are wanted
  const float *cosines, *sines;                     // [position][rotary / 2]
  float* cache;                                     // [layers][2][slots][capacity][kv_heads * dim]
  long all_slots, capacity;
  float* logits;
};

void rmsnorm(const float* x, const float* w, int n, float eps, float* y) {
  float sum = 0;
  for (int i = 0; i < n; i++) sum += x[i] * x[i];
  float r = 1.0f / std::sqrt(sum / n + eps);
  for (int i = 0; i < n; i++) y[i] = x[i] * r * w[i];
}

void rotate(float* x, const float* c, const float* s, int half) {
  for (int i = 0; i < half; i++) {
    float a = x[i], b = x[half + i];
    x[i] = a * c[i] - b * s[i];
    x[half + i] = b * c[i] + a * s[i];
  }
}

struct Run {
  Model& m;
  const Step& s;
  std::vector<Tile> tiles;
  std::atomic<int> next{0};

  Run(Model& model, const Step& step) : m(model), s(step) {
    int most = m.dim % AT_ONCE ? 1 : std::max(1, QUERIES / (m.heads / m.kv_heads));  // rows of a tile
    for (int r = 0; r < s.n; r++) {
      Tile* t = tiles.empty() ? nullptr : &tiles.back();
      if (t && t->count < most && s.slots[r] == t->slot && s.positions[r] == t->position + t->count)
        t->count++;
      else
        tiles.push_back({r, 1, s.slots[r], s.positions[r]});
    }
  }

  Input input(const float* x, long stride) { return {x, stride, m.q.data(), m.xs.data(), m.offsets.data()}; }

  void prepare(const Linear& l, const float* x, long stride, Range rows) { input(x, stride).prepare(l, rows); }

  void product(const Linear& l, const float* x, long stride, int rows, const Out& out, int thread) {
    multiply(l, input(x, stride), rows, share(l.panels, thread, m.team->size), out, m.isa);
  }

  void normed(const Linear& l, const float* w, Range rows) {
    for (int r = rows.begin; r < rows.end; r++) rmsnorm(&m.x[(size_t)r * m.width], w, m.width, m.eps, &m.h[(size_t)r * m.width]);
    prepare(l, m.h.data(), m.width, rows);
  }

  void operator()(int thread) {
    int threads = m.team->size;
    Range rows = share(s.n, thread, threads);
    int queries = m.heads * m.dim, kv = m.kv_heads * m.dim, all = queries + 2 * kv;
    for (int r = rows.begin; r < rows.end; r++)
      for (int i = 0; i < m.width; i++) m.x[(size_t)r * m.width + i] = m.embedding[s.ids[r] * m.width + i] * m.embedding_scale;
    for (size_t i = 0; i < m.layers.size(); i++) {
      Layer& l = m.layers[i];
      normed(*l.qkv, l.norm1, rows);
      m.team->meet();
      product(*l.qkv, m.h.data(), m.width, s.n, {m.qkv.data(), all, STORE, 0}, thread);
      m.team->meet();
      float* keys = s.cache + 2 * i * s.all_slots * s.capacity * kv;
      float* values = keys + s.all_slots * s.capacity * kv;
      for (int r = rows.begin; r < rows.end; r++) place(l, &m.qkv[(size_t)r * all], s.slots[r], s.positions[r], keys, values);
      if (thread == 0) next.store(0, std::memory_order_relaxed);
      m.team->meet();
      int tasks = (int)tiles.size() * m.kv_heads;
      for (int task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) attention(l, tasks - 1 - task, keys, values, thread);
      m.team->meet();
      prepare(*l.o, m.attended.data(), queries, rows);
      if (l.o->rounds()) m.team->meet();
      product(*l.o, m.attended.data(), queries, s.n, {m.x.data(), m.width, ADD, 0}, thread);
      m.team->meet();
      normed(*l.gate_up, l.norm2, rows);
      m.team->meet();
      product(*l.gate_up, m.h.data(), m.width, s.n, {m.gated.data(), m.inner, GATE, m.act}, thread);
      m.team->meet();
      prepare(*l.down, m.gated.data(), m.inner, rows);
      if (l.down->rounds()) m.team->meet();
      product(*l.down, m.gated.data(), m.inner, s.n, {m.x.data(), m.width, ADD, 0}, thread);
      m.team->meet();
    }
    Range wanted = share(s.outputs, thread, threads);
    for (int r = wanted.begin; r < wanted.end; r++) rmsnorm(&m.x[(size_t)s.which[r] * m.width], m.norm, m.width, m.eps, &m.h[(size_t)r * m.width]);
    prepare(*m.head, m.h.data(), m.width, wanted);
    m.team->meet();
    product(*m.head, m.h.data(), m.width, s.outputs, {s.logits, m.head->n, STORE, 0}, thread);
  }

  void place(const Layer& l, float* qkv, long slot, long position, float* keys, float* values) {
    int kv = m.kv_heads * m.dim, half = m.rotary / 2;
    const float *c = s.cosines + position * half, *sn = s.sines + position * half;
    for (int h = 0; h < m.heads + m.kv_heads; h++) {
      float* x = qkv + h * m.dim;
      const float* w = h < m.heads ? l.qnorm : l.knorm;
      if (w) rmsnorm(x, w, m.dim, m.eps, x);
      rotate(x, c, sn, half);
    }
    long at = (slot * s.capacity + position) * kv;
    std::memcpy(keys + at, qkv + m.heads * m.dim, kv * sizeof(float));
    std::memcpy(values + at, qkv + m.heads * m.dim + kv, kv * sizeof(float));
  }

  // The last tiles of a prompt have the most keys: they are begun first.
  void attention(const Layer& l, int task, const float* keys, const float* values, int thread) {
    const Tile& t = tiles[task / m.kv_heads];
    int head = task % m.kv_heads, groups = m.heads / m.kv_heads, kv = m.kv_heads * m.dim, all = (m.heads + 2 * m.kv_heads) * m.dim;
    auto& scratch = m.scratch[thread];
    long at = t.slot * s.capacity * kv + head * m.dim, queries = m.heads * m.dim;
    const float* q = &m.qkv[(size_t)t.row * all + head * groups * m.dim];
    float* y = &m.attended[(size_t)t.row * queries + head * groups * m.dim];
    if (t.count == 1) {
      int length = (int)t.position + 1, first = l.window ? std::max(0, length - l.window) : 0;
      if (scratch.scores.size() < (size_t)groups * length) scratch.scores.resize((size_t)groups * length * 2);
      long from = at + (long)first * kv;
      return attend(q, keys + from, values + from, kv, length - first, groups, m.dim, m.attention_scale, scratch.scores.data(), y);
    }
    auto f = t.count * groups <= WIDTH ? attend_tile<1> : t.count * groups <= 2 * WIDTH ? attend_tile<2> : attend_tile<3>;
    f(t, q, all, keys + at, values + at, kv, l.window, groups, m.dim, m.attention_scale, scratch, y, queries);
  }
};

}  // namespace

extern "C" {

int hasten_isa() { return best_isa(); }

int hasten_bf16() {  // whether there are products of bf16
#if defined(HASTEN_BF16)
  return 1;
#else
  return 0;
#endif
}

void* hasten_team(int threads) { return new Team(std::max(1, threads)); }
void hasten_team_free(void* team) { delete static_cast<Team*>(team); }

void* hasten_linear(const float* weight, const float* bias, int n, int k, int bits) { return pack(weight, bias, n, k, bits); }
void* hasten_linear_int4(const int8_t* q, const int8_t* step, const float* scale, const float* bias, int n, int k) {
  return pack_int4(q, step, scale, bias, n, k);
}
void hasten_linear_free(void* l) { delete static_cast<Linear*>(l); }

// x [m][k] -> y [m][n]
void hasten_linear_run(void* linear, void* team, const float* x, int m, float* y, int isa) {
  auto& l = *static_cast<Linear*>(linear);
  auto& t = *static_cast<Team*>(team);
  static thread_local std::vector<int8_t> buffer;
  static thread_local std::vector<float> scales;
  static thread_local std::vector<int32_t> sums;
  if (l.rounds()) buffer.resize((size_t)(m + 16) * l.row()), scales.resize(m), sums.resize((size_t)m * l.groups());
  Input in{x, l.k, buffer.data(), scales.data(), sums.data()};
  isa = std::min(isa, best_isa());
  auto work = [&](int thread) {
    in.prepare(l, share(m, thread, t.size));
    if (l.rounds()) t.meet();
    multiply(l, in, m, share(l.panels, thread, t.size), {y, l.n, STORE, 0}, isa);
  };
  t.run(work);
}

void* hasten_model(const int* sizes, const float* numbers, const float* embedding, const float* norm, void* head, void* team) {
  auto* m = new Model{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], numbers[0], numbers[1], numbers[2], embedding, norm,
                      static_cast<Linear*>(head)};
  m->isa = std::min(sizes[7], best_isa());
  m->team = static_cast<Team*>(team);
  m->scratch.resize(m->team->size);
  return m;
}

void hasten_model_layer(void* model, void* qkv, void* o, void* gate_up, void* down, const float* norm1, const float* norm2, const float* qnorm,
                        const float* knorm, int window) {
  static_cast<Model*>(model)->layers.push_back({static_cast<Linear*>(qkv), static_cast<Linear*>(o), static_cast<Linear*>(gate_up),
                                                static_cast<Linear*>(down), norm1, norm2, qnorm, knorm, window});
}

void hasten_model_free(void* model) { delete static_cast<Model*>(model); }

void hasten_step(void* model, int n, const int64_t* ids, const int64_t* slots, const int64_t* positions, int outputs, const int64_t* which,
                 const float* cosines, const float* sines, float* cache, long all_slots, long capacity, float* logits) {
  auto& m = *static_cast<Model*>(model);
  if (n > m.room) {
    m.room = n;
    size_t all = (m.heads + 2 * m.kv_heads) * m.dim, queries = m.heads * m.dim, most = 0;
    for (auto& l : m.layers) most = std::max({most, (size_t)l.qkv->row(), (size_t)l.o->row(), (size_t)l.down->row()});
    m.x.resize(n * m.width), m.h.resize(n * m.width), m.qkv.resize(n * all), m.attended.resize(n * queries), m.gated.resize((size_t)n * m.inner);
    m.xs.resize(n), m.q.resize((n + 16) * most), m.offsets.resize(n * most / GROUP);
  }
  Step s{n, outputs, ids, slots, positions, which, cosines, sines, cache, all_slots, capacity, logits};
  Run run{m, s};
  m.team->run(run);
}
}

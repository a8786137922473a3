// Vectors of 64, 32 or 16 bytes chosen at load time, and the elementwise functions of the forward
// pass.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#define PROTEUS_INLINE inline __attribute__((always_inline))

// Widest vectors used; a smaller number shows what an older processor does.
#ifndef PROTEUS_SIMD_BYTES
#define PROTEUS_SIMD_BYTES 64
#endif

namespace proteus {

// Every buffer of the forward pass is padded to whole groups of 16 floats, whatever the vectors.
inline constexpr std::size_t kLanes = 16;

constexpr std::size_t padded(std::size_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Vector types of one width.
template <std::size_t Bytes>
struct Simd {
    static constexpr std::size_t kBytes = Bytes;
    static constexpr std::size_t kFloats = Bytes / sizeof(float);
    static constexpr std::size_t kPerGroup = kLanes / kFloats;
    typedef float Float __attribute__((vector_size(Bytes)));
    typedef std::int32_t Int __attribute__((vector_size(Bytes)));
    typedef std::uint32_t Uint __attribute__((vector_size(Bytes)));
    typedef std::int16_t Short __attribute__((vector_size(Bytes / 2)));
    typedef std::int8_t Byte __attribute__((vector_size(Bytes / 4)));
};

#if defined(__x86_64__) && defined(__GNUC__)
#define PROTEUS_V4 __attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma")))
#define PROTEUS_V3 __attribute__((target("avx2,fma")))

inline std::size_t detect_simd_bytes() {
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    const std::size_t found = v4 ? 64 : v3 ? 32 : 16;
    return found < PROTEUS_SIMD_BYTES ? found : PROTEUS_SIMD_BYTES;
}
inline const std::size_t kSimdBytes = detect_simd_bytes();

template <typename Body, typename... Args>
PROTEUS_V4 auto run_v4(Args... args) {
    return Body::template run<Simd<64>>(args...);
}
template <typename Body, typename... Args>
PROTEUS_V3 auto run_v3(Args... args) {
    return Body::template run<Simd<32>>(args...);
}
#endif

// Runs Body::run<Simd<...>>(args...), an always_inline template, compiled for this processor. One
// portable binary holds all versions. Not target_clones: its AVX2 clone of code with vectors of 64
// bytes keeps them in memory (14 times slower), its AVX-512 clone of code with vectors of 32 bytes
// leaves half the speed, and a program with it dies under g++ 12's thread sanitizer before main.
template <typename Body, typename... Args>
inline auto dispatch(Args... args) {
#if defined(__x86_64__) && defined(__GNUC__)
    if (kSimdBytes == 64) return run_v4<Body>(args...);
    if (kSimdBytes == 32) return run_v3<Body>(args...);
#endif
    return Body::template run<Simd<16>>(args...);
}

inline constexpr std::size_t kHugePage = std::size_t{2} << 20;

// Whole cache lines; whole huge pages for what is larger than one.
template <typename T>
struct AlignedAllocator {
    using value_type = T;
    AlignedAllocator() = default;
    template <typename U>
    explicit AlignedAllocator(const AlignedAllocator<U>&) {}
    static constexpr std::size_t alignment(std::size_t bytes) {
        return bytes >= kHugePage ? kHugePage : 64;
    }
    T* allocate(std::size_t n) {
        const std::size_t bytes = n * sizeof(T);
        void* memory = ::operator new(bytes, std::align_val_t{alignment(bytes)});
#ifdef MADV_HUGEPAGE
        // a large table is read at random: with small pages the address look-ups cost more than
        // the data; failure is harmless
        if (bytes >= kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
        return static_cast<T*>(memory);
    }
    void deallocate(T* p, std::size_t n) {
        ::operator delete(p, std::align_val_t{alignment(n * sizeof(T))});
    }
    bool operator==(const AlignedAllocator&) const { return true; }
};

template <typename T>
using AlignedVector = std::vector<T, AlignedAllocator<T>>;

template <typename To, typename From>
PROTEUS_INLINE To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <typename S>
PROTEUS_INLINE typename S::Float load(const float* p) {
    typename S::Float v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <typename V>
PROTEUS_INLINE void store(float* p, V v) {
    std::memcpy(p, &v, sizeof v);
}

// Sum of the lanes in a fixed order.
template <typename S>
PROTEUS_INLINE float sum_lanes(typename S::Float v) {
    float total[S::kFloats];
    std::memcpy(total, &v, sizeof v);
    for (std::size_t width = S::kFloats / 2; width > 0; width /= 2)
        for (std::size_t i = 0; i < width; ++i) total[i] += total[i + width];
    return total[0];
}

// To [-80, 80] as integers, which take one instruction each where floats take two; NaN becomes 80
// or -80.
template <typename S>
PROTEUS_INLINE typename S::Float clamp_exponent(typename S::Float x) {
    using Int = typename S::Int;
    using Uint = typename S::Uint;
    const Int top = Int{} + 0x42A00000;
    const Uint bottom = Uint{} + 0xC2A00000u;
    const Int low = bits_as<Int>(x);
    const Uint both = bits_as<Uint>(low < top ? low : top);
    return bits_as<typename S::Float>(both < bottom ? both : bottom);
}

// exp by Cephes' polynomial (S. Moshier, expf), relative error 2e-7, for x in [-80, 80].
template <typename S>
PROTEUS_INLINE typename S::Float exp_vec(typename S::Float x) {
    using Float = typename S::Float;
    using Uint = typename S::Uint;
    // adding and subtracting 1.5 * 2^23 rounds to the nearest integer
    const Float shifted = x * 1.44269504088896341f + 12582912.0f;
    const Float n = shifted - 12582912.0f;
    x = x - n * 0.693359375f;
    x = x + n * 2.12194440e-4f;
    // Estrin's order: the chain of dependent operations is what limits the speed
    const Float square = x * x;
    const Float low = x * 1.6666665459e-1f + 5.0000001201e-1f;
    const Float middle = x * 8.3334519073e-3f + 4.1665795894e-2f;
    const Float high = x * 1.9875691500e-4f + 1.3981999507e-3f;
    const Float poly = ((high * square + middle) * square + low) * square + (x + 1.0f);
    // the low bits of `shifted` hold the integer itself, so shifting them makes the exponent
    return poly * bits_as<Float>((bits_as<Uint>(shifted) << 23) + 0x3F800000u);
}

// NaN and infinities become NaN.
template <typename S>
PROTEUS_INLINE typename S::Float sigmoid_vec(typename S::Float x) {
    return 1.0f / (1.0f + exp_vec<S>(clamp_exponent<S>(-x))) + (x - x);
}

// gelu(x) = 0.5 x (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
template <typename S>
PROTEUS_INLINE typename S::Float gelu_vec(typename S::Float x) {
    const typename S::Float inner = x * (x * x * -0.0713548162726f - 1.5957691216057f);
    return x / (1.0f + exp_vec<S>(clamp_exponent<S>(inner)));
}

}  // namespace proteus

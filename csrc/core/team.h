// Lanes that work on one line together: a warp on CUDA; on the host a loop, over one lane, or over
// 32 with the warp's shuffle tree, so that its indexing and summation order run without a GPU.
// Lane k takes the items k, k + lanes, ...; a reduction gives its result to every lane.
#pragma once

#include "core/host_device.h"

namespace pybackdoor {

template <int count>
struct HostTeam {
  static constexpr int lanes = count;
};

// `n` sums formed together.
template <typename T, int n>
struct Sums {
  T v[n];
};

template <typename T, int n>
PB_HD Sums<T, n> combine(Sums<T, n> a, const Sums<T, n>& b) {
  PB_UNROLL
  for (int k = 0; k < n; ++k) a.v[k] += b.v[k];
  return a;
}

// log of a sum of exponentials, with an online maximum.
template <typename T>
struct LogSum {
  T max, sum;  // exp(max) * sum; an empty one is {-inf, 0}
};

template <typename T>
PB_HD LogSum<T> empty_log_sum() {
  return {static_cast<T>(-INFINITY), T(0)};
}

template <typename T>
PB_HD void push(LogSum<T>* s, T x) {  // NaN reaches the sum
  if (x > s->max) {
    s->sum = s->sum * std::exp(s->max - x) + 1;
    s->max = x;
  } else if (x != static_cast<T>(-INFINITY)) {
    s->sum += std::exp(x - s->max);
  }
}

template <typename T>
PB_HD LogSum<T> combine(const LogSum<T>& a, const LogSum<T>& b) {
  const T max = a.max > b.max ? a.max : b.max;
  const T from_a = a.max == max ? a.sum : a.sum * std::exp(a.max - max);
  const T from_b = b.max == max ? b.sum : b.sum * std::exp(b.max - max);
  return {max, from_a + from_b};
}

template <typename T>
PB_HD T value(const LogSum<T>& s) {
  return s.max + std::log(s.sum);
}

template <int lanes, typename F>
PB_HD void each_lane(HostTeam<lanes>, F f) {
  for (int lane = 0; lane < lanes; ++lane) f(lane);
}

template <int lanes, typename F>
PB_HD auto reduce(HostTeam<lanes>, F f) -> decltype(f(0)) {
  decltype(f(0)) part[lanes], next[lanes];
  for (int lane = 0; lane < lanes; ++lane) part[lane] = f(lane);
  for (int step = lanes / 2; step > 0; step /= 2) {
    for (int lane = 0; lane < lanes; ++lane) next[lane] = combine(part[lane], part[lane ^ step]);
    for (int lane = 0; lane < lanes; ++lane) part[lane] = next[lane];
  }
  return part[0];
}

// Runs take(i), by the whole team, for the i of [begin, end) that wanted(i) holds for, in order.
template <int lanes, typename W, typename F>
PB_HD void each_where(HostTeam<lanes>, int64_t begin, int64_t end, W wanted, F take) {
  for (int64_t i = begin; i < end; ++i) {
    if (wanted(i)) take(i);
  }
}

template <int lanes>
PB_HD bool leads(HostTeam<lanes>) {
  return true;
}

#ifdef __CUDACC__
struct WarpTeam {
  int lane;
  static constexpr int lanes = 32;
};

template <typename T>
__device__ static inline T from_lane(const T& value, int step) {
  constexpr int kWords = sizeof(T) / 4;
  uint32_t words[kWords];
  std::memcpy(words, &value, sizeof(T));
  PB_UNROLL
  for (int k = 0; k < kWords; ++k) words[k] = __shfl_xor_sync(0xFFFFFFFFu, words[k], step);
  T other;
  std::memcpy(&other, words, sizeof(T));
  return other;
}

template <typename F>
PB_HD void each_lane(const WarpTeam& team, F f) {
  f(team.lane);
}

template <typename F>
PB_HD auto reduce(const WarpTeam& team, F f) -> decltype(f(0)) {
  decltype(f(0)) part = f(team.lane);
#ifdef __CUDA_ARCH__
  PB_UNROLL
  for (int step = 16; step > 0; step /= 2) part = combine(part, from_lane(part, step));
#endif
  return part;
}

// Lanes ask for neighbours: a warp looks through 32 at a time.
template <typename W, typename F>
PB_HD void each_where(const WarpTeam& team, int64_t begin, int64_t end, W wanted, F take) {
#ifdef __CUDA_ARCH__
  PB_ROLLED
  for (int64_t first = begin; first < end; first += 32) {
    const int64_t i = first + team.lane;
    uint32_t found = __ballot_sync(0xFFFFFFFFu, i < end && wanted(i));
    for (; found != 0; found &= found - 1) take(first + __ffs(static_cast<int>(found)) - 1);
  }
#endif
}

PB_HD bool leads(const WarpTeam& team) { return team.lane == 0; }

// One thread that works alone.
struct ThreadTeam {
  int lane;  // 0
  static constexpr int lanes = 1;
};

template <typename F>
PB_HD auto reduce(const ThreadTeam&, F f) -> decltype(f(0)) {
  return f(0);
}

template <typename F>
PB_HD void each_lane(const ThreadTeam&, F f) {
  f(0);
}

PB_HD bool leads(const ThreadTeam&) { return true; }
#endif

}  // namespace pybackdoor

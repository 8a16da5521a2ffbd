// Checks of adamw_ema, and its body on the host: the test driver. The CPU's own path is torch's
// fused AdamW.
#include "core/check.h"
#include "ops/adamw_ema_body.h"

namespace pybackdoor {

void check_adamw_ema(const AdamwEmaArgs& a, const std::vector<AdamwEmaGroup>& groups) {
  PB_CHECK(a.num_tensors >= 0 && a.num_chunks >= 0, "adamw_ema: sizes must be >= 0");
  PB_CHECK(a.num_chunks < int64_t{1} << 31, "adamw_ema: there must be fewer than 2^31 chunks");
  PB_CHECK(a.chunk > 0 && a.chunk % 4 == 0, "adamw_ema: chunk must be a multiple of 4");
  PB_CHECK(a.num_tensors == 0 || (a.tensors && a.scalars && a.status),
           "adamw_ema: tensors, scalars and status are required");
  PB_CHECK(a.num_chunks == 0 || (a.chunks && a.partials),
           "adamw_ema: chunks and partials are required");
  int64_t tensor = 0, chunk = 0;
  for (const AdamwEmaGroup& group : groups) {
    PB_CHECK(group.first_tensor == tensor && group.first_chunk == chunk && group.tensors >= 0 &&
                 group.num_chunks >= 0,
             "adamw_ema: the groups must follow each other");
    tensor += group.tensors;
    chunk += group.num_chunks;
  }
  PB_CHECK(tensor == a.num_tensors && chunk == a.num_chunks,
           "adamw_ema: the groups must hold all tensors and chunks");
}

namespace {

// The sum of the lanes' values in the order of CUDA: a shuffle tree per warp, then warp by warp.
template <typename T>
double lanes_sum(std::vector<T> v) {
  double sum = 0.0;
  const size_t warp = v.size() < 32 ? v.size() : 32;
  for (size_t first = 0; first < v.size(); first += warp) {
    for (size_t offset = warp / 2; offset > 0; offset /= 2) {
      const std::vector<T> before = v;
      for (size_t k = 0; k < warp; ++k) {
        v[first + k] = add_rn(before[first + k], before[first + (k ^ offset)]);
      }
    }
    sum = add_rn(sum, static_cast<double>(v[first]));
  }
  return sum;
}

template <typename T, typename Body>
double over_lanes(int lanes, const Body& body) {
  std::vector<T> values;
  for (int lane = 0; lane < lanes; ++lane) values.push_back(body(lane));
  return lanes_sum(values);
}

template <bool kNoise>
void run(const AdamwEmaArgs& args, const std::vector<AdamwEmaGroup>& groups, int lanes) {
  if (args.norm_wanted) {
    for (int64_t c = 0; c < args.num_chunks; ++c) {
      args.partials[c] =
          over_lanes<float>(lanes, [&](int lane) { return norm_chunk(args, c, lane, lanes); });
    }
  }
  const auto total = [&] {
    return over_lanes<double>(lanes, [&](int lane) { return partial_sum(args, lane, lanes); });
  };
  finish_norm(args, args.norm_wanted ? total() : 0.0);
  if (args.status->skip != 0.f) return;
  for (const AdamwEmaGroup& group : groups) {
    for (int64_t k = 0; k < group.tensors; ++k) prepare_tensor(args, group, group.first_tensor + k);
    for (int64_t c = group.first_chunk; c < group.first_chunk + group.num_chunks; ++c) {
      args.partials[c] = over_lanes<float>(
          lanes, [&](int lane) { return update_chunk<kNoise>(args, group, c, lane, lanes); });
    }
  }
  if (!std::isfinite(args.radius)) return;
  finish_distance(args, total());
  for (int64_t c = 0; c < args.num_chunks; ++c) {
    for (int lane = 0; lane < lanes; ++lane) project_chunk<kNoise>(args, c, lane, lanes);
  }
}

}  // namespace

void adamw_ema_lanes(const AdamwEmaArgs& args, const std::vector<AdamwEmaGroup>& groups,
                     int lanes) {
  check_adamw_ema(args, groups);
  PB_CHECK(lanes == 1 || (lanes > 0 && lanes % 32 == 0 && lanes <= 1024),
           "adamw_ema: lanes must be 1 or a multiple of 32 up to 1024");
  if (args.num_tensors == 0) return;
  if (args.noise_std != 0.f) return run<true>(args, groups, lanes);
  run<false>(args, groups, lanes);
}

}  // namespace pybackdoor

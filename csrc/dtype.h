// The dtypes of feature maps and features.
#pragma once

namespace mrcn {

enum class Dtype { f32, f64, bf16, f16 };

}  // namespace mrcn

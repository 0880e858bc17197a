// The size of one attention head of one sample.
#pragma once

#include "common.h"

namespace wbdit {

struct Head {
  int64_t tokens, p, stride;  // stride between tokens: h * p
};

}  // namespace wbdit

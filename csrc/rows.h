// Rows of fp32 or bf16 as rows of fp32. Included once for each instruction set.

// A row as fp32: itself, or widened into the buffer.
static const float* read(const Rows& from, int64_t row, float* __restrict buffer, int64_t d) {
  if (!from.low) return static_cast<const float*>(from[row]);
  const bf16* __restrict source = static_cast<const bf16*>(from[row]);
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) buffer[i] = to_float(source[i]);
  return buffer;
}

// Where to write a row as fp32: into place, or into the buffer that written() narrows.
static float* writable(const Rows& to, int64_t row, float* buffer) {
  return to.low ? buffer : static_cast<float*>(to[row]);
}

static void written(const Rows& to, int64_t row, const float* __restrict buffer, int64_t d) {
  if (!to.low) return;
  bf16* __restrict target = static_cast<bf16*>(to[row]);
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) target[i] = from_float<bf16>(buffer[i]);
}

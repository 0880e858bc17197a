// The fp32 kernel of mssa. Included once for each instruction set.

#include "sweep.h"

#include "mssa_tile_f32.h"

#include "mssa_kernel.h"

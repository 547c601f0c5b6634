// Scratch memory of one thread for the CPU kernels, kept from call to call: fresh memory costs more
// in page faults than many kernels take. It is as large as the largest request of the thread so
// far.
#pragma once

#include <cstdint>

namespace pyfast {

// At least `bytes`, aligned to 64, until the next call on this thread. Where memory is short, the
// process ends with a message: threads of a kernel have nobody to report to.
void* thread_workspace(int64_t bytes);

}  // namespace pyfast

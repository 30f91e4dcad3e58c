// All-reduce of small float64 payloads between processes of one host, through memory that they share.
//
// One shot: every rank writes its payload into a slot of its own, the last to arrive opens the round, and each rank
// sums all slots in rank order, so that the results are equal bit for bit. Slots are double-buffered: a rank that
// writes into a buffer again knows that all have left the round in between, and so have read what it overwrites.
//
// One word holds the state: the round that is open, and whether the ranks have given up. It is only changed by
// compare-and-swap from the round it is about, so a round ends alike for all of its ranks: complete or given up.
// Who has arrived is read from the slots, never counted, so a rank may be killed between any two instructions.

#ifdef __linux__

#include <ATen/core/Tensor.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <torch/library.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace {

constexpr size_t kLine = 64;
constexpr size_t kPage = 4096;
constexpr size_t kLabelBytes = 200;
constexpr size_t kSlotValues = 8192;  // 4095 channels in one chunk
constexpr int64_t kSliceNs = 20'000'000;  // a futex cannot wait for a process to end, so that is looked at in between

// Waking a sleeper takes long, tens of microseconds and more where the core has to be woken as well, or where the kernel
// puts the sleeper on its waker's core; and a rank that was woken comes late to the next call. So a rank first pauses,
// then yields, which leaves the core to any thread that needs it, and sleeps only after a while. Where that did not pay
// for some time, peers are far behind or there are too few cores, and it is only tried again now and then.
constexpr int kManyPauses = 1000;
constexpr int kFewPauses = 20;
constexpr int64_t kYieldNs = 1'000'000;
constexpr uint32_t kPatience = 8;  // sleeps in a row
constexpr uint32_t kTryAgain = 16;

// The state word: the number of completed rounds, and how it ended.
constexpr uint32_t kGivenUp = 1u << 31;
constexpr uint32_t kDiverged = 1u << 30;
constexpr uint32_t kRounds = kDiverged - 1;

enum Outcome : int64_t { kComplete = 0, kDivergence = 1, kNotAllCame = 2, kRefused = 3, kClosed = 4, kForked = 5 };

static_assert(std::atomic<uint32_t>::is_always_lock_free && std::atomic<uint64_t>::is_always_lock_free,
              "a lock inside of an atomic would not be shared between processes");

struct alignas(kLine) Control {
  char nonce[kLine];  // written and compared by the set-up
  alignas(kLine) std::atomic<uint32_t> state;
  alignas(kLine) std::atomic<uint32_t> sleepers;  // a killed one stays counted, which costs a system call per round
};

struct alignas(kLine) Membership {
  std::atomic<uint32_t> has_left;
};

struct alignas(kLine) Slot {
  std::atomic<uint64_t> sequence;  // 1 + the round that the rest is of
  uint64_t num_values;             // of the whole payload, not of the chunk
  uint32_t label_size;
  char label[kLabelBytes];
  alignas(kLine) double values[kSlotValues];
};

size_t round_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

size_t slots_offset(size_t world_size) {
  return round_up(sizeof(Control) + world_size * sizeof(Membership), kPage);
}

size_t memory_bytes(size_t world_size) {
  return round_up(slots_offset(world_size) + 2 * world_size * sizeof(Slot), kPage);
}

void futex_wait(std::atomic<uint32_t>& word, uint32_t seen, int64_t timeout_ns) {
  const timespec timeout{timeout_ns / 1'000'000'000, timeout_ns % 1'000'000'000};
  syscall(SYS_futex, &word, FUTEX_WAIT, seen, &timeout, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>& word) { syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

int64_t now_ns() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * int64_t{1'000'000'000} + now.tv_nsec;
}

void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int num_cores() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
}

void add(double* __restrict__ sum, const double* __restrict__ values, size_t num_values) {
  for (size_t i = 0; i < num_values; ++i) sum[i] += values[i];
}

class Exchange {
 public:
  Exchange(int fd, size_t rank, size_t world_size, double timeout_s, std::vector<int> pidfds)
      : rank_(rank),
        world_size_(world_size),
        timeout_ns_(static_cast<int64_t>(std::min(timeout_s, 1e9) * 1e9)),
        has_cores_(static_cast<size_t>(num_cores()) >= world_size),
        pidfds_(std::move(pidfds)),
        bytes_(memory_bytes(world_size)) {
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    TORCH_CHECK(memory_ != MAP_FAILED, "mmap of the exchange's memory: ", std::strerror(errno));
    madvise(memory_, bytes_, MADV_DONTFORK);  // a forked child is no rank, and finds nothing there
  }

  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  ~Exchange() {
    membership(rank_).has_left.store(1);
    munmap(memory_, bytes_);
    for (const int fd : pidfds_) {
      if (fd >= 0) close(fd);
    }
  }

  // Whether this process made it, and not the one that this was forked from.
  bool is_own() const { return getpid() == pid_; }

  int64_t all_reduce_sum(double* values, size_t num_values, std::string_view label) {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t done = 0;
    do {  // a payload of no values is a meeting too
      const size_t chunk = std::min(num_values - done, kSlotValues);
      const Outcome outcome = meet(values + done, chunk, num_values, label);
      if (outcome != kComplete) return outcome;
      done += chunk;
    } while (done < num_values);
    return kComplete;
  }

  // Of the round in which the ranks gave up, for each rank: 1 if it arrived, 2 if it is gone, else 0; the number of
  // values it brought; its label.
  std::tuple<std::vector<int64_t>, std::vector<int64_t>, std::vector<std::string>> report() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const uint32_t state = control().state.load();
    const uint64_t round = (state & kDiverged) ? (state - 1) & kRounds : state & kRounds;
    std::vector<int64_t> where;
    std::vector<int64_t> num_values;
    std::vector<std::string> labels;
    for (size_t rank = 0; rank < world_size_; ++rank) {
      const Slot& slot = this->slot(round, rank);
      const uint64_t sequence = slot.sequence.load();
      const bool arrived = sequence != 0 && ((sequence - 1) & kRounds) == round;
      where.push_back(arrived ? 1 : is_gone(rank) ? 2 : 0);
      num_values.push_back(arrived ? static_cast<int64_t>(slot.num_values) : 0);
      labels.push_back(arrived ? std::string(label_of(slot)) : std::string());
    }
    return {where, num_values, labels};
  }

 private:
  Control& control() { return *static_cast<Control*>(memory_); }

  Membership& membership(size_t rank) {
    return reinterpret_cast<Membership*>(static_cast<char*>(memory_) + sizeof(Control))[rank];
  }

  Slot& slot(uint64_t round, size_t rank) {
    char* slots = static_cast<char*>(memory_) + slots_offset(world_size_);
    return reinterpret_cast<Slot*>(slots)[(round & 1) * world_size_ + rank];
  }

  static std::string_view label_of(const Slot& slot) {
    // Bounded, since a report may look while a rank that comes late writes.
    return {slot.label, std::min<size_t>(slot.label_size, kLabelBytes)};
  }

  Outcome meet(double* values, size_t chunk, size_t num_values, std::string_view label) {
    std::atomic<uint32_t>& state = control().state;
    const auto round = static_cast<uint32_t>(round_ & kRounds);
    if (state.load(std::memory_order_acquire) & kGivenUp) return kRefused;

    Slot& mine = slot(round_, rank_);
    mine.num_values = num_values;
    mine.label_size = static_cast<uint32_t>(label.size());
    std::memcpy(mine.label, label.data(), label.size());
    std::memcpy(mine.values, values, chunk * sizeof(double));
    // Sequentially consistent, here and in `all_arrived`: of two ranks that arrive at once, one sees the other.
    mine.sequence.store(round_ + 1);

    if (all_arrived()) {
      leave_round(round, (round + 1) & kRounds);
    }
    const Outcome outcome = wait(round);
    if (outcome != kComplete) return outcome;
    if (diverged(mine)) {
      // No rank has got beyond this round without seeing the same.
      state.fetch_or(kGivenUp | kDiverged);
      return kDivergence;
    }

    std::memcpy(values, slot(round_, 0).values, chunk * sizeof(double));
    for (size_t rank = 1; rank < world_size_; ++rank) add(values, slot(round_, rank).values, chunk);
    ++round_;
    return kComplete;
  }

  // Ends the round for all of its ranks, unless another rank did.
  void leave_round(uint32_t round, uint32_t next_state) {
    uint32_t expected = round;
    if (control().state.compare_exchange_strong(expected, next_state) && control().sleepers.load() != 0) {
      futex_wake_all(control().state);
    }
  }

  Outcome wait(uint32_t round) {
    if (!is_over(round) && !spin_until_over(round)) {
      ++sleeps_in_a_row_;
      sleep_until_over(round);
    }
    // Whatever the ranks have done since, they completed this round first if its number is past.
    return (control().state.load() & kRounds) != round ? kComplete : kNotAllCame;
  }

  bool is_over(uint32_t round) { return control().state.load(std::memory_order_acquire) != round; }

  // Whether the round ended while it was worth to stay awake.
  bool spin_until_over(uint32_t round) {
    const bool patient = has_cores_ && (sleeps_in_a_row_ < kPatience || sleeps_in_a_row_ % kTryAgain == 0);
    for (int pause = 0; pause < (patient ? kManyPauses : kFewPauses); ++pause) {
      pause_briefly();
      if (is_over(round)) {
        sleeps_in_a_row_ = 0;
        return true;
      }
    }
    if (!patient) return false;
    for (const int64_t until_ns = now_ns() + kYieldNs; now_ns() < until_ns;) {
      sched_yield();
      if (is_over(round)) {
        sleeps_in_a_row_ = 0;
        return true;
      }
    }
    return false;
  }

  void sleep_until_over(uint32_t round) {
    std::atomic<uint32_t>& state = control().state;
    const int64_t deadline_ns = now_ns() + timeout_ns_;
    // Counted before the state is looked at: who changes it either sees the sleeper or is seen by it.
    control().sleepers.fetch_add(1);
    while (state.load() == round) {
      futex_wait(state, round, std::clamp<int64_t>(deadline_ns - now_ns(), 0, kSliceNs));
      if (state.load() != round) break;
      const bool over = now_ns() >= deadline_ns || a_missing_rank_is_gone();
      if (all_arrived()) {  // the last to arrive was stopped or killed before it could say so
        leave_round(round, (round + 1) & kRounds);
      } else if (over) {
        leave_round(round, round | kGivenUp);
      }
    }
    control().sleepers.fetch_sub(1);
  }

  bool has_arrived(size_t rank) { return slot(round_, rank).sequence.load() == round_ + 1; }

  bool all_arrived() {
    for (size_t rank = 0; rank < world_size_; ++rank) {
      if (!has_arrived(rank)) return false;
    }
    return true;
  }

  bool a_missing_rank_is_gone() {
    for (size_t rank = 0; rank < world_size_; ++rank) {
      // Looked at again once it is known to be gone: it may have arrived before it ended.
      if (!has_arrived(rank) && is_gone(rank) && !has_arrived(rank)) return true;
    }
    return false;
  }

  bool is_gone(size_t rank) {
    if (membership(rank).has_left.load() != 0) return true;
    if (pidfds_[rank] < 0) return false;
    pollfd process{pidfds_[rank], POLLIN, 0};
    return poll(&process, 1, 0) == 1;
  }

  bool diverged(const Slot& mine) {
    for (size_t rank = 0; rank < world_size_; ++rank) {
      const Slot& theirs = slot(round_, rank);
      if (theirs.num_values != mine.num_values || label_of(theirs) != label_of(mine)) return true;
    }
    return false;
  }

  const size_t rank_;
  const size_t world_size_;
  const int64_t timeout_ns_;
  const bool has_cores_;
  uint32_t sleeps_in_a_row_ = 0;
  const std::vector<int> pidfds_;
  const size_t bytes_;
  const pid_t pid_ = getpid();
  void* memory_;
  uint64_t round_ = 0;
  std::mutex mutex_;
};

// Never destroyed: a rank's other threads may still be in a call while the process ends.
struct Registry {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<Exchange>> exchanges;
  int64_t next_handle = 1;
};

Registry& registry() {
  static auto* const instance = new Registry();
  return *instance;
}

std::shared_ptr<Exchange> find(int64_t handle) {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  const auto found = registry().exchanges.find(handle);
  return found == registry().exchanges.end() ? nullptr : found->second;
}

int64_t exchange_bytes(int64_t world_size) { return static_cast<int64_t>(memory_bytes(world_size)); }

int64_t exchange_open(int64_t fd, int64_t rank, int64_t world_size, double timeout_s, at::IntArrayRef pidfds) {
  TORCH_CHECK(0 <= rank && rank < world_size && pidfds.size() == static_cast<size_t>(world_size),
              "expected a pidfd for each of the ", world_size, " ranks, and rank ", rank, " to be one of them");
  auto exchange = std::make_shared<Exchange>(static_cast<int>(fd), rank, world_size, timeout_s,
                                             std::vector<int>(pidfds.begin(), pidfds.end()));
  const std::lock_guard<std::mutex> lock(registry().mutex);
  const int64_t handle = registry().next_handle++;
  registry().exchanges.emplace(handle, std::move(exchange));
  return handle;
}

int64_t exchange_all_reduce_sum(int64_t handle, const at::Tensor& payload, std::string_view label) {
  TORCH_CHECK(payload.scalar_type() == at::kDouble && payload.is_contiguous(),
              "payload: expected a contiguous float64 tensor, got ", payload.scalar_type());
  TORCH_CHECK(label.size() <= kLabelBytes, "label: expected at most ", kLabelBytes, " bytes, got ", label.size());
  const std::shared_ptr<Exchange> exchange = find(handle);
  if (!exchange) return kClosed;
  if (!exchange->is_own()) return kForked;
  return exchange->all_reduce_sum(payload.mutable_data_ptr<double>(), payload.numel(), label);
}

std::tuple<std::vector<int64_t>, std::vector<int64_t>, std::vector<std::string>> exchange_report(int64_t handle) {
  const std::shared_ptr<Exchange> exchange = find(handle);
  TORCH_CHECK(exchange, "no exchange has the handle ", handle);
  return exchange->report();
}

void exchange_close(int64_t handle) {
  std::shared_ptr<Exchange> closed;  // unmapped once no call uses it, and outside of the lock
  const std::lock_guard<std::mutex> lock(registry().mutex);
  const auto found = registry().exchanges.find(handle);
  if (found == registry().exchanges.end()) return;
  closed = std::move(found->second);
  registry().exchanges.erase(found);
}

}  // namespace

// The dispatcher hands over with Python's lock released. `timeout_s` bounds each wait; on success the exchange owns
// the pidfds (-1 for this rank itself) and needs `fd` no more.
TORCH_LIBRARY_FRAGMENT(syncbn_native, m) {
  m.def("exchange_bytes(int world_size) -> int", &exchange_bytes);
  m.def("exchange_open(int fd, int rank, int world_size, float timeout_s, int[] pidfds) -> int", &exchange_open);
  m.def("exchange_all_reduce_sum(int handle, Tensor(a!) payload, str label) -> int");
  m.def("exchange_report(int handle) -> (int[], int[], str[])", &exchange_report);
  m.def("exchange_close(int handle) -> ()", &exchange_close);
}

TORCH_LIBRARY_IMPL(syncbn_native, CPU, m) { m.impl("exchange_all_reduce_sum", &exchange_all_reduce_sum); }

#endif  // __linux__

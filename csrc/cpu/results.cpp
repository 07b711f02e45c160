#include "results.h"

#include <cstdlib>
#include <mutex>
#include <utility>

namespace sui {
namespace {

constexpr Index kHead = 64;  // bytes before a result, which hold its size

std::mutex lock;
char* kept = nullptr;

Index& size_of(char* block) { return *reinterpret_cast<Index*>(block); }

}  // namespace

void* take_result(Index bytes) {
  char* block = nullptr;
  {
    const std::lock_guard<std::mutex> guard(lock);
    block = kept;
    kept = nullptr;
  }
  if (block && (size_of(block) < bytes || size_of(block) / 2 > bytes)) {
    std::free(block);
    block = nullptr;
  }
  if (!block) {
    block = static_cast<char*>(std::aligned_alloc(kHead, (kHead + bytes + kHead - 1) / kHead * kHead));
    if (!block) return nullptr;
    size_of(block) = bytes;
  }
  return block + kHead;
}

void return_result(void* memory) {
  char* block = static_cast<char*>(memory) - kHead;
  if (size_of(block) <= kMostKept) {
    const std::lock_guard<std::mutex> guard(lock);
    std::swap(block, kept);
  }
  std::free(block);
}

}  // namespace sui

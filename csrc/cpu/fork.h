// Whether OpenMP may run in this process. It may not in a child of fork(): the threads of GNU's runtime stay in the
// parent, and the child's first parallel region waits for them without end if the parent has had one.
#pragma once

#include <unistd.h>

#include <fstream>
#include <sstream>
#include <string>

namespace fused_sam {

// Returns true if this process is a child of fork() without an exec() since, as Linux tells it.
inline bool forked_without_exec() {
  constexpr unsigned long kForkNoExec = 0x40;  // PF_FORKNOEXEC of the kernel's include/linux/sched.h
  std::ifstream file("/proc/self/stat");
  std::string line;
  if (!std::getline(file, line)) return false;
  const size_t name_end = line.rfind(')');  // the name of the program may contain anything
  if (name_end == std::string::npos) return false;
  std::istringstream fields(line.substr(name_end + 1));
  std::string skipped;
  for (int i = 0; i < 6; ++i) fields >> skipped;  // state, parent, group, session, terminal, its group
  unsigned long flags = 0;
  return bool(fields >> flags) && (flags & kForkNoExec) != 0;
}

inline const pid_t kLoadedBy = getpid();
inline const bool kLoadedInChild = forked_without_exec();

// Returns true in a child of fork(), also if the module was first loaded there.
inline bool in_forked_child() { return kLoadedInChild || getpid() != kLoadedBy; }

}  // namespace fused_sam

// SPDX-License-Identifier: Apache-2.0
// The C++ tests' framework: TEST(name) { CHECK(...); } and TEST_MAIN. A failed CHECK ends its test; the program's exit
// status is the number of failed tests.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace check {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Test {
  const char* name;
  void (*body)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> tests;
  return tests;
}

inline bool add(const char* name, void (*body)()) {
  tests().push_back({name, body});
  return true;
}

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  throw Failure(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

template <class A, class B>
void equal(const A& a, const B& b, const char* text, const char* file, int line) {
  if (a == b) return;
  std::ostringstream message;
  message << text << ": " << a << " != " << b;
  fail(file, line, message.str());
}

// The message of the exception that `body` throws; empty if it throws none.
template <class Exception, class Body>
std::string thrown_message(Body body) {
  try {
    body();
  } catch (const Exception& exception) {
    return exception.what();
  }
  return "";
}

// Runs `body` in a child process; what it wrote to stderr if it died, empty if it went to its end.
template <class Body>
std::string death_message(Body body) {
  int pipe_ends[2];
  if (pipe(pipe_ends) != 0) throw std::runtime_error("pipe failed");
  const pid_t child = fork();
  if (child < 0) throw std::runtime_error("fork failed");
  if (child == 0) {
    dup2(pipe_ends[1], STDERR_FILENO);
    close(pipe_ends[0]);
    body();
    _exit(0);
  }
  close(pipe_ends[1]);
  std::string text;
  char buffer[4096];
  for (ssize_t n; (n = read(pipe_ends[0], buffer, sizeof(buffer))) > 0;) text.append(buffer, static_cast<size_t>(n));
  close(pipe_ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? "" : "died: " + text;
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

inline int run_all() {
  int failed = 0;
  for (const Test& test : tests()) {
    try {
      test.body();
      std::printf("ok      %s\n", test.name);
    } catch (const std::exception& exception) {
      ++failed;
      std::printf("FAILED  %s\n        %s\n", test.name, exception.what());
    }
    std::fflush(stdout);
  }
  std::printf("%zu tests, %d failed\n", tests().size(), failed);
  return failed;
}

}  // namespace check

#define TEST(name)                                                  \
  static void test_##name();                                        \
  static const bool added_##name = check::add(#name, &test_##name); \
  static void test_##name()
#define TEST_MAIN()          \
  int main() {               \
    return check::run_all(); \
  }
#define CHECK(condition) \
  if (!(condition)) check::fail(__FILE__, __LINE__, #condition)
#define CHECK_EQUAL(a, b) check::equal(a, b, #a " == " #b, __FILE__, __LINE__)
#define CHECK_CONTAINS(text, part) \
  if (!check::contains(text, part)) check::fail(__FILE__, __LINE__, "\"" part "\" is not in \"" + (text) + "\"")

// What a function of the C interface does with an error: it gives null or false, and pipe_native_error has the text.
#pragma once
#include <exception>
#include <string>

inline thread_local std::string pipe_error;

template <class F> auto guarded(F run) -> decltype(run()) {
  try {
    return run();
  } catch (const std::exception& e) {
    pipe_error = e.what();
    return {};
  }
}

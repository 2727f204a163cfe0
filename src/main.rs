//! The `pipe` program: everything is in the library, so that tests reach it.

/// Planning is making and dropping many small things, at which the system's allocator is half as fast.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    pipe::cli::main()
}

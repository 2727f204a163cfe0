//! Compiles the native half, gives `pipe-worker` and the learning package's tests a run path to libtorch, and keeps its CUDA
//! half linked.

use std::path::{Path, PathBuf};

/// The sets of instructions that the kernels are compiled for, and what the compiler is told for each.
const SETS: &[(&str, &[&str])] = &[
    ("base", &[]),
    ("avx2", &["-mavx2", "-mfma"]),
    ("avx512", &["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]),
];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=DEP_TCH_LIBTORCH_LIB");
    for source in ["kernels.h", "kernels.cpp", "guarded.h", "ops.cpp", "context.cpp", "varlen.cpp", "graph.cpp"] {
        println!("cargo:rerun-if-changed=src/native/{source}");
    }
    let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") else {
        panic!("torch-sys did not say where libtorch lies: name it with LIBTORCH");
    };
    compile(Path::new(&lib));
    println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
    // Nothing names a symbol of the CUDA half, so the linker would drop it and no GPU would ever be seen.
    if Path::new(&lib).join("libtorch_cuda.so").exists() {
        println!("cargo:rustc-link-search=native={lib}");
        println!("cargo:rustc-link-arg=-Wl,--no-as-needed");
        println!("cargo:rustc-link-arg=-ltorch_cuda");
        println!("cargo:rustc-link-arg=-lc10_cuda");
        println!("cargo:rustc-link-arg=-ltorch");
        println!("cargo:rustc-link-arg=-Wl,--as-needed");
    }
}

/// Compiles the kernels, once for each set of instructions, and the operations that give them to libtorch.
fn compile(lib: &Path) {
    let x86 = std::env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|target| target == "x86_64");
    let build = || {
        let mut build = cc::Build::new();
        build.cpp(true).std("c++17").opt_level(3).debug(false).warnings(false).cargo_metadata(false);
        build
    };
    let mut all = build();
    for (name, flags) in SETS.iter().filter(|(name, _)| x86 || *name == "base") {
        let mut kernels = build();
        kernels.file("src/native/kernels.cpp").define("PIPE_ISA", *name);
        // One instruction for a product and a sum, but no other liberty: the same source gives the same bits.
        for flag in ["-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi"].iter().chain(*flags) {
            kernels.flag(flag);
        }
        // libtorch brings the runtime of gcc's threads. Built by another compiler the kernels take one thread and give the same.
        if kernels.get_compiler().is_like_gnu() {
            kernels.flag("-fopenmp");
        }
        // One source thrice: each has a folder for its object.
        let folder = Path::new(&std::env::var("OUT_DIR").expect("cargo names a folder")).join(name);
        all.objects(kernels.out_dir(folder).compile_intermediates());
    }
    println!("cargo:rerun-if-env-changed=LIBTORCH_INCLUDE");
    let named = std::env::var_os("LIBTORCH_INCLUDE").map(std::path::PathBuf::from);
    let include = named.as_deref().or(lib.parent()).unwrap_or(lib).join("include");
    all.files(["ops.cpp", "context.cpp", "varlen.cpp", "graph.cpp"].map(|source| Path::new("src/native").join(source)))
        .include(include.join("torch/csrc/api/include"))
        .include(include);
    if let Some(headers) = cuda_headers(lib) {
        all.define("PIPE_CUDA", None).include(headers);
    }
    let abi = std::env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".to_owned());
    all.define("_GLIBCXX_USE_CXX11_ABI", abi.as_str());
    all.cargo_metadata(true).compile("pipe_native");
}

/// Where the headers of CUDA's runtime lie, if libtorch has a CUDA half: beside the wheel that it came in, or where a toolkit
/// puts them. Without them the build has no CUDA graphs.
fn cuda_headers(lib: &Path) -> Option<PathBuf> {
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    if !lib.join("libtorch_cuda.so").exists() {
        return None;
    }
    // `site-packages/torch/lib` to `site-packages/nvidia/cu13/include`, or `.../cuda_runtime/include` in older wheels.
    let wheels = std::fs::canonicalize(lib).ok().and_then(|lib| std::fs::read_dir(lib.join("../../nvidia")).ok());
    let mut beside: Vec<PathBuf> =
        wheels.into_iter().flatten().flatten().map(|folder| folder.path().join("include")).collect();
    beside.sort();
    let toolkit = std::env::var_os("CUDA_HOME").map_or("/usr/local/cuda".into(), PathBuf::from).join("include");
    // Wheels keep what the headers of the runtime include in a package of its own (`nvidia-cuda-crt`).
    let needed = ["cuda_runtime_api.h", "crt/host_config.h"];
    beside.into_iter().chain([toolkit]).find(|folder| needed.iter().all(|header| folder.join(header).exists()))
}

//! Links the library with GNU ld.
//!
//! Nothing in it can panic or unwind, and GNU ld then leaves out the standard library's panic
//! machinery. LLVM's linker keeps it: it holds everything for needed that a table for unwinding
//! names, also one of code that is left out. A test looks at the result.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-fuse-ld=bfd");
}

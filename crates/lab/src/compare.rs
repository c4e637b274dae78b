//! Before and after: two or more result directories side by side.

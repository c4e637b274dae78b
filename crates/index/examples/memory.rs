//! Resident memory of a table: `cargo run --release -p index --example memory -- [MILLIONS]`.
//!
//! Registers that many million contents for two hosts each, claims them, and prints what the
//! process holds, and how long its longest batch took, at every eighth.

use std::time::{Duration, Instant};

use index::{ClientNo, Item, Table};
use page::{ContentId, HostNo};

/// Uniform numbers, different ones for different `n` (`SplitMix64`).
fn mix(n: u64) -> u64 {
    let mut z = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

fn id(n: u64) -> ContentId {
    ContentId((u128::from(mix(n)) << 64 | u128::from(mix(!n))).to_le_bytes())
}

/// Resident now, and at most so far, in bytes.
fn resident() -> (u64, u64) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        kib.unwrap_or(0) * 1024
    };
    (field("VmRSS:"), field("VmHWM:"))
}

fn main() {
    let millions = std::env::args().nth(1).and_then(|n| n.parse::<u64>().ok());
    let contents = millions.unwrap_or(10) * 1_000_000;
    let (mut table, empty) = (Table::new(1, 0), resident().0);
    let (mut entries, mut verdicts) = (Vec::new(), Vec::new());
    let (began, mut longest) = (Instant::now(), Duration::ZERO);
    for start in (0..contents).step_by(1000) {
        let batch = (start..start + 1000).map(id);
        let items: Vec<_> = batch.map(|id| Item { id, pages: 1 }).collect();
        let ids: Vec<_> = items.iter().map(|item| item.id).collect();
        let at = Instant::now();
        for host in [start / 1000 % 40, start / 1000 % 31 + 20] {
            entries.clear();
            let host = HostNo(u16::try_from(host).unwrap_or(0));
            table.register(host, &items, &mut entries);
        }
        verdicts.clear();
        table.claim(HostNo(3), ClientNo(1), &ids, &mut verdicts);
        longest = longest.max(at.elapsed());
        let done = start + 1000;
        if done % (contents / 8 / 1000 * 1000) == 0 {
            let (now, peak) = resident();
            println!(
                "{done} entries: {} MB, {} bytes an entry, at most {} so far; {:.1} s, longest 1000 {:.2} ms",
                (now - empty) / 1_000_000,
                (now - empty) / done,
                (peak - empty) / done,
                began.elapsed().as_secs_f64(),
                longest.as_secs_f64() * 1000.0,
            );
        }
    }
    let began = Instant::now();
    table.client_gone(ClientNo(1));
    println!(
        "client_gone: {:.0} ms",
        began.elapsed().as_secs_f64() * 1000.0
    );
    let began = Instant::now();
    table.withdraw(HostNo(3));
    println!("withdraw: {:.3} ms", began.elapsed().as_secs_f64() * 1000.0);
    println!("{:?}", table.summary());
}

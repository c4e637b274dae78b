//! Scans the VMs behind QMP sockets three times and says what it took:
//! `cargo run --release -p guest --example scan -- QMP...`

use std::error::Error;
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use guest::SourceGuest;
use guest::scan::{Bounds, Pace, Scan, ScanProgress};
use page::ContentKey;

fn main() -> Result<(), Box<dyn Error>> {
    let mut vms = Vec::new();
    for qmp in std::env::args().skip(1) {
        let (guest, _events) = SourceGuest::attach(Path::new(&qmp))?;
        vms.push((qmp, guest.examine_memory()?));
    }
    let mut scan = Scan::new(ContentKey::new([1; 32]));
    let mut out = io::stdout().lock();
    for round in 1..=3 {
        let (cancelled, progress) = (AtomicBool::new(false), ScanProgress::default());
        let (begin, cpu) = (Instant::now(), sys::thread_cpu_time());
        let bounds = Bounds {
            cpu_percent: 100,
            read_bytes_per_s: u64::MAX,
        };
        let mut pace = Pace::new(bounds, &cancelled, &progress);
        scan.begin();
        let (mut read, mut sampled, mut joined) = (0, 0, 0);
        for (name, vm) in &vms {
            let done = scan.scan_vm((name, vm.process), &vm.memory, &vm.regions, &mut pace)?;
            read += done.read;
            sampled += done.sampled;
            joined += done.joined;
        }
        scan.end();
        let cpu = sys::thread_cpu_time() - cpu;
        writeln!(
            out,
            "scan {round}: {:.1} ms of processor time, {:.1} ms; {read} read, {sampled} sampled, \
             {joined} joined; {:?}",
            cpu.as_secs_f64() * 1e3,
            begin.elapsed().as_secs_f64() * 1e3,
            scan.tally(|_| true),
        )?;
    }
    Ok(())
}

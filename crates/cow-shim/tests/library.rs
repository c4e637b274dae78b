//! The library as the loader and the agent see it, in a process that is made for it.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::process::Command;
use std::time::Duration;

use common::{
    Puppet, flags_in, has_thread, library, near_dir, page_of, pool, rollup_kib, thread_time, within,
};
use content::pool::{Pool, PoolUser, PoolVm, uses_pool};
use cow_abi::{Features, FromAgent, FromLibrary, MapBatch, MapRun, Outcome, VERSION};
use guest::{CowError, RamBlock};
use page::{BlockIndex, ByteLen, ContentId, HostAddr, PAGE_SIZE, PageNo};
use sys::{Pagemap, PagemapEntry, SeqPacketListener};

const SECONDS_10: Duration = Duration::from_secs(10);

fn run(page: u32, pages: u32, pool_page: u64) -> MapRun {
    MapRun {
        block: 0,
        page,
        pages,
        pool_page,
    }
}

/// Not a test of its own: what the puppets run.
#[test]
fn puppet() {
    common::be_a_puppet();
}

#[test]
fn the_library_has_no_code_that_panics_unwinds_or_allocates() {
    let nm = Command::new("nm")
        .arg("-C")
        .arg(library())
        .output()
        .unwrap();
    assert!(nm.status.success(), "nm is a part of gcc's tools");
    let symbols = String::from_utf8(nm.stdout).unwrap();
    assert!(symbols.contains(" T madvise") && symbols.contains(" T ioctl"));
    let forbidden = [
        "panic",
        "unwind",
        "Unwind",
        "eh_personality",
        "alloc",
        "abort",
        "std::rt",
        "fmt::",
    ];
    let found: Vec<_> = symbols
        .lines()
        .filter(|line| forbidden.iter().any(|word| line.contains(word)))
        .collect();
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn mapped_and_copied_pages_have_the_pools_bytes_and_the_rest_stays() {
    let (mut puppet, mut library) = Puppet::served(16);
    assert!(library.features().has(Features::NO_HUGE_PAGES));
    for page in 0..16 {
        puppet.ask(&format!("write {page} {}", page + 1));
    }
    let pool = pool(&[page_of(101), page_of(102), page_of(103)]);
    library.set_pool(&pool).unwrap();
    let outcomes = library.map(&[run(2, 2, 1), run(8, 1, 0)], false).unwrap();
    assert_eq!(outcomes, [Outcome::Mapped, Outcome::Mapped]);
    assert_eq!(
        library.map(&[run(10, 1, 2)], true).unwrap(),
        [Outcome::Copied]
    );
    assert!(library.settle().unwrap());
    let bytes: Vec<u8> = (0..16).map(|page| puppet.byte(page)).collect();
    assert_eq!(
        bytes,
        [1, 2, 102, 103, 5, 6, 7, 8, 101, 10, 103, 12, 13, 14, 15, 16]
    );

    // A write is the process's own; the pool and the other pages keep theirs.
    puppet.ask("write 2 77");
    let mut byte = [0];
    pool.map()
        .unwrap()
        .read(PAGE_SIZE as u64, &mut byte)
        .unwrap();
    assert_eq!((byte[0], puppet.byte(2), puppet.byte(3)), (102, 77, 103));
    let statistics = library.close().unwrap();
    assert_eq!((statistics.runs_mapped, statistics.pages_mapped), (2, 3));
    assert_eq!((statistics.pages_copied, statistics.runs_refused), (1, 0));
    assert_eq!(puppet.byte(3), 103);
    within(SECONDS_10, || (!has_thread(puppet.pid())).then_some(()));
}

#[test]
fn a_discarded_page_of_the_pool_is_empty_memory_with_its_advice() {
    let (mut puppet, mut library) = Puppet::served(8);
    library
        .set_pool(&pool(&[page_of(9), page_of(9), page_of(9)]))
        .unwrap();
    library.map(&[run(1, 3, 0), run(6, 1, 0)], false).unwrap();
    assert!(library.settle().unwrap());
    puppet.ask("write 0 5");
    puppet.ask("write 2 6");
    assert_eq!(puppet.ask("discard 0 3"), "0");
    let bytes: Vec<u8> = (0..8).map(|page| puppet.byte(page)).collect();
    assert_eq!(bytes, [0, 0, 0, 9, 0, 0, 9, 0]);
    assert_eq!(library.statistics().unwrap().pages_discarded, 2);
    // What was there before is there again: nothing that a fork or a dump would take along.
    let areas = flags_in(
        puppet.pid(),
        puppet.memory.hva.unwrap(),
        puppet.memory.used_len,
    );
    assert!(areas.len() > 3);
    for (area, flags) in areas {
        assert!(
            flags.contains(" dc") && flags.contains(" dd"),
            "{area}: {flags}"
        );
    }
    // Also when the agent has gone.
    drop(library);
    assert_eq!(puppet.ask("discard 3 5"), "0");
    assert_eq!((puppet.byte(3), puppet.byte(6)), (0, 0));
}

/// As in post-copy: who reads a page that is not there waits until it is placed.
#[test]
fn a_page_that_was_announced_is_mapped_when_it_is_placed_and_who_waits_for_it_reads_it() {
    let (mut puppet, mut library) = Puppet::served(8);
    let bytes = [page_of(9), page_of(9), page_of(7)];
    library.set_pool(&pool(&bytes)).unwrap();
    library.map(&[run(0, 1, 0)], false).unwrap();
    assert_eq!(puppet.ask("watch"), "0");
    let outcomes = library.expect(&[run(2, 2, 0), run(5, 1, 2), run(7, 2, 0)]);
    let refused = Outcome::Refused(22);
    assert_eq!(
        outcomes.unwrap(),
        [Outcome::Expected, Outcome::Expected, refused]
    );
    let of_pool = |puppet: &Puppet| {
        let areas = flags_in(
            puppet.pid(),
            puppet.memory.hva.unwrap(),
            puppet.memory.used_len,
        );
        let of_pool = |(area, _): &&(String, String)| area.contains("gangway-test-pool");
        areas.iter().filter(of_pool).count()
    };
    assert_eq!(of_pool(&puppet), 1);
    assert_eq!(puppet.ask("wait 2"), "0", "it is not there yet");
    assert_eq!(puppet.ask("place 2 9"), "4096");
    assert_eq!((puppet.ask("woken").as_str(), of_pool(&puppet)), ("9", 2));
    // With other bytes than the pool's, or not announced, it is QEMU's copy.
    for (page, byte) in [(3, 8), (4, 9), (7, 9)] {
        assert_eq!(puppet.ask(&format!("wait {page}")), "0");
        assert_eq!(puppet.ask(&format!("place {page} {byte}")), "4096");
        assert_eq!(puppet.ask("woken"), byte.to_string());
    }
    assert_eq!(of_pool(&puppet), 2);
    let exists = format!("-{}", libc::EEXIST);
    assert_eq!(puppet.ask("place 4 9"), exists, "nobody copies over it");
    // What was mapped is the guest's, whoever brings it again.
    for page in [0, 2] {
        puppet.ask(&format!("write {page} 5"));
        assert_eq!(puppet.ask(&format!("place {page} 9")), "4096");
        assert_eq!(puppet.byte(page), 5);
    }
    let statistics = library.statistics().unwrap();
    let counts = (statistics.fault_maps, statistics.fault_maps_failed);
    assert_eq!((counts, statistics.fault_copies), ((1, 1), 7));
    // What was announced stays so without the agent.
    drop(library);
    within(SECONDS_10, || (!has_thread(puppet.pid())).then_some(()));
    assert_eq!(puppet.ask("wait 5"), "0");
    assert_eq!(puppet.ask("place 5 7"), "4096");
    assert_eq!((puppet.ask("woken").as_str(), of_pool(&puppet)), ("7", 3));
    assert_eq!(puppet.ask("discard 5 1"), "0");
    assert_eq!((puppet.byte(5), of_pool(&puppet)), (0, 2));
}

#[test]
fn what_does_not_fit_is_refused_and_harms_nothing() {
    let (mut puppet, mut library) = Puppet::served(8);
    library.set_pool(&pool(&[page_of(9), page_of(9)])).unwrap();
    let refused = Outcome::Refused(u16::try_from(libc::EINVAL).unwrap());
    let outside = [
        run(7, 2, 0),
        run(0, 3, 0),
        run(0, 1, 2),
        MapRun {
            block: 1,
            ..run(0, 1, 0)
        },
    ];
    assert_eq!(library.map(&outside, false).unwrap(), [refused; 4]);
    assert_eq!(
        library.map(&[run(3, 1, 1)], false).unwrap(),
        [Outcome::Mapped]
    );
    assert_eq!((puppet.byte(0), puppet.byte(3)), (0, 9));

    let again = library.add_block(1, &puppet.memory).unwrap_err();
    // Its middle is the pool's now, so that it is no plain memory any more.
    assert!(matches!(again, CowError::Block { .. }), "{again}");
    let nowhere = RamBlock {
        hva: Some(HostAddr(PAGE_SIZE as u64)),
        ..puppet.memory.clone()
    };
    let error = library.add_block(2, &nowhere).unwrap_err();
    let CowError::Block { source, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(source.raw_os_error(), Some(libc::EFAULT));
    let unknown = RamBlock {
        hva: None,
        ..nowhere
    };
    assert!(library.add_block(2, &unknown).is_err());
}

#[test]
fn a_pool_that_could_shrink_is_refused() {
    let (_puppet, mut library) = Puppet::served(4);
    let shrinking = sys::Memfd::create("shrinks", ByteLen(4096)).unwrap();
    assert!(matches!(
        library.set_pool(&shrinking),
        Err(CowError::Pool(_))
    ));
    library.set_pool(&pool(&[page_of(1)])).unwrap();
    assert!(matches!(
        library.set_pool(&pool(&[page_of(1)])),
        Err(CowError::Pool(_))
    ));
}

/// Half as many single pages as the kernel allows mappings need more than it has.
#[test]
fn pages_beyond_the_kernels_limit_of_mappings_are_copied() {
    let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    let limit: u32 = limit.trim().parse().unwrap();
    let pages = limit + 4096;
    let (mut puppet, mut library) = Puppet::served(pages as usize);
    library.set_pool(&pool(&[page_of(42)])).unwrap();
    let runs: Vec<_> = (0..pages / 2).map(|i| run(2 * i, 1, 0)).collect();
    let outcomes = library.map(&runs, false).unwrap();
    let mapped = outcomes.iter().filter(|o| **o == Outcome::Mapped).count();
    let copied = outcomes.iter().filter(|o| **o == Outcome::Copied).count();
    assert_eq!(mapped + copied, runs.len(), "none is refused");
    assert!(
        mapped > limit as usize / 2 - 1000 && copied > 1000,
        "{mapped} and {copied}"
    );
    let last = outcomes.len() - 1;
    assert_eq!(outcomes[last], Outcome::Copied);
    assert_eq!(
        (puppet.byte(0), puppet.byte(1), puppet.byte(2 * last)),
        (42, 0, 42)
    );
    puppet.ask(&format!("write {} 7", 2 * last + 1));
    assert_eq!(puppet.byte(2 * last + 1), 7);
}

#[test]
fn two_processes_share_one_page_until_one_writes() {
    const PAGES: u32 = 4096;
    let contents: Vec<_> = (0..PAGES)
        .map(|i| page_of(u8::try_from(i % 251).unwrap()))
        .collect();
    let pool = pool(&contents);
    let start = || {
        let (puppet, mut library) = Puppet::served(PAGES as usize);
        library.set_pool(&pool).unwrap();
        assert_eq!(
            library.map(&[run(0, PAGES, 0)], false).unwrap(),
            [Outcome::Mapped]
        );
        (puppet, library)
    };
    let (mut one, _one) = start();
    let (mut other, _other) = start();
    for page in 0..PAGES as usize {
        assert_eq!(usize::from(one.byte(page)), page % 251);
        assert_eq!(usize::from(other.byte(page)), page % 251);
    }
    let pss = rollup_kib(one.pid(), "Pss");
    let rss = rollup_kib(one.pid(), "Rss");
    assert!(
        rss - pss > u64::from(PAGES) * 4 / 3,
        "rss {rss} KiB, pss {pss} KiB"
    );
    for page in 0..PAGES as usize {
        one.ask(&format!("write {page} 255"));
    }
    assert!((0..PAGES as usize).all(|page| usize::from(other.byte(page)) == page % 251));
}

#[test]
fn a_run_is_mapped_in_microseconds_and_idle_calls_cost_nothing_to_speak_of() {
    const RUNS: u32 = 16_384;
    let (mut puppet, mut library) = Puppet::served(2 * RUNS as usize);
    // As on a real target: memory is there already.
    for page in (0..2 * RUNS).step_by(64) {
        puppet.ask(&format!("write {page} 1"));
    }
    library.set_pool(&pool(&[page_of(1)])).unwrap();
    let mut plain = Puppet::launch(1, near_dir(), |_| ());
    let ns = |puppet: &mut Puppet| puppet.ask("bench 400").parse::<f64>().unwrap() / 1000.0;
    let (mut without, mut idle) = (f64::MAX, f64::MAX);
    for _ in 0..8 {
        without = without.min(ns(&mut plain));
        idle = idle.min(ns(&mut puppet));
    }
    let runs: Vec<_> = (0..RUNS).map(|i| run(2 * i, 1, 0)).collect();
    let start = thread_time(puppet.pid());
    library.map(&runs, false).unwrap();
    let mapped = thread_time(puppet.pid());
    library.settle().unwrap();
    let settled = thread_time(puppet.pid());
    let us = (mapped - start).as_secs_f64() * 1e6 / f64::from(RUNS);
    let settle_ms = (settled - mapped).as_secs_f64() * 1e3;
    let busy = ns(&mut puppet);
    println!(
        "{us:.2} us a run, {settle_ms:.1} ms to settle {RUNS} runs; ioctl and madvise together \
         {without:.1} ns without the library, {idle:.1} ns with nothing mapped, {busy:.1} ns with"
    );
    // Bounds that a busy machine keeps, too.
    assert!(us < 8.0, "{us} us");
    assert!(
        idle < without * 1.5 + 50.0,
        "{idle} ns against {without} ns"
    );
}

#[test]
fn an_agent_of_another_version_or_a_silent_one_leaves_the_process_alone() {
    let dir = near_dir();
    let path = dir.path().join("cow");
    let listener = SeqPacketListener::bind(&path).unwrap();
    let puppet_dir = near_dir();
    let mut puppet = Puppet::launch(4, puppet_dir, |command| {
        command
            .env("LD_PRELOAD", library())
            .env("GANGWAY_COW_SOCKET", &path);
    });
    let socket = listener.accept(SECONDS_10).unwrap().unwrap();
    assert!(huge_pages_are_off(puppet.pid()));
    let mut packet = [0; 64];
    let len = FromAgent::Welcome { version: 99 }
        .encode(1, &mut packet)
        .unwrap();
    socket.send(&packet[..len], None).unwrap();
    let mut buffer = [0; 64];
    socket.set_timeout(SECONDS_10).unwrap();
    assert!(socket.receive(&mut buffer).unwrap() > 0, "its hello");
    assert!(socket.receive(&mut buffer).unwrap() > 0, "its refusal");
    assert_eq!(socket.receive(&mut buffer).unwrap(), 0, "its end");
    // The thread has its name a moment after its start, and goes when it has given all back.
    within(SECONDS_10, || {
        let pid = puppet.pid();
        (!has_thread(pid) && !huge_pages_are_off(pid)).then_some(())
    });
    puppet.ask("write 1 8");
    assert_eq!(puppet.byte(1), 8);
}

#[test]
fn packets_that_make_no_sense_end_the_connection_and_not_the_process() {
    let mut packet = [0; 64];
    let len = FromAgent::Welcome { version: VERSION }
        .encode(1, &mut packet)
        .unwrap();
    let welcome = &packet[..len];
    let mut early = [0; 64];
    let batch = MapBatch::new(false, &[]).unwrap();
    let early_len = FromAgent::Map(batch).encode(2, &mut early).unwrap();
    for nonsense in [
        &b"?"[..],
        &[0xff; 64],
        &[0; 16],
        welcome,
        &early[..early_len],
    ] {
        let dir = near_dir();
        let path = dir.path().join("cow");
        let listener = SeqPacketListener::bind(&path).unwrap();
        let mut puppet = Puppet::launch(4, dir, |command| {
            command
                .env("LD_PRELOAD", library())
                .env("GANGWAY_COW_SOCKET", &path);
        });
        let socket = listener.accept(SECONDS_10).unwrap().unwrap();
        socket.set_timeout(SECONDS_10).unwrap();
        let mut answer = [0; 64];
        assert!(socket.receive(&mut answer).unwrap() > 0, "its hello");
        socket.send(welcome, None).unwrap();
        socket.send(nonsense, None).unwrap();
        let len = socket.receive(&mut answer).unwrap();
        let (_, message) = FromLibrary::decode(&answer[..len]).unwrap();
        assert!(matches!(message, FromLibrary::Refused(_)), "{message:?}");
        assert_eq!(socket.receive(&mut answer).unwrap(), 0, "its end");
        within(SECONDS_10, || (!has_thread(puppet.pid())).then_some(()));
        puppet.ask("write 1 8");
        assert_eq!(puppet.byte(1), 8);
    }
}

#[test]
fn nobody_listening_or_a_program_that_is_no_qemu_means_nothing_happens() {
    let dir = near_dir();
    let path = dir.path().join("nobody");
    let puppet_dir = near_dir();
    let mut puppet = Puppet::launch(4, puppet_dir, |command| {
        command
            .env("LD_PRELOAD", library())
            .env("GANGWAY_COW_SOCKET", &path);
    });
    puppet.ask("write 1 8");
    // The thread has its name a moment after its start, and goes when it has given all back.
    within(SECONDS_10, || {
        let pid = puppet.pid();
        (!has_thread(pid) && !huge_pages_are_off(pid)).then_some(())
    });
    assert_eq!(puppet.byte(1), 8);

    let path = dir.path().join("cow");
    let listener = SeqPacketListener::bind(&path).unwrap();
    let output = Command::new("sh")
        .args(["-c", "echo $GANGWAY_COW_SOCKET"])
        .env("LD_PRELOAD", library())
        .env("GANGWAY_COW_SOCKET", &path)
        .output()
        .unwrap();
    // A wrapper passes the variable on to the QEMU that it starts.
    assert!(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("cow"));
    assert!(listener.accept(Duration::ZERO).unwrap().is_none());
}

fn huge_pages_are_off(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("THP_enabled:"));
    line.unwrap().trim() == "0"
}

/// The whole way of a content: into the pool, into two processes, and out when both have written.
#[test]
fn contents_that_every_process_has_written_give_their_memory_back() {
    const PAGES: u32 = 64;
    let len = ByteLen(u64::from(PAGES) * PAGE_SIZE as u64);
    let mut book = Pool::new(ByteLen(1 << 30));
    let mut puppets: Vec<_> = (0..2).map(|_| Puppet::served(PAGES as usize)).collect();
    for vm in 0..2 {
        book.add_vm(PoolVm(vm), &[len]).unwrap();
    }
    let file = sys::Memfd::create_growing("gangway-test-pool").unwrap();
    file.set_len(ByteLen(book.file_pages() * PAGE_SIZE as u64))
        .unwrap();
    for ((_, library), vm) in puppets.iter_mut().zip(0..) {
        library.set_pool(&file).unwrap();
        for page in 0..PAGES {
            let byte = u8::try_from(page + 1).unwrap();
            let (block, page) = (BlockIndex(0), PageNo(page));
            let user = PoolUser {
                vm: PoolVm(vm),
                block,
                page,
            };
            let placed = book.place(ContentId([byte; 16]), user).unwrap();
            if placed.new {
                file.write_at(placed.at.offset(), &page_of(byte)).unwrap();
            }
            let mapped = library.map(&[run(page.0, 1, placed.at.0)], false).unwrap();
            assert_eq!(mapped, [Outcome::Mapped]);
        }
        assert!(library.settle().unwrap());
    }
    assert_eq!((file.allocated().unwrap(), book.live()), (len, len));

    // Both write the first half, one of them the rest, too.
    for page in 0..PAGES {
        puppets[0].0.ask(&format!("write {page} 200"));
        if page < PAGES / 2 {
            puppets[1].0.ask(&format!("write {page} 201"));
        }
    }
    for ((puppet, _), vm) in puppets.iter().zip(0..) {
        let mut entries = vec![PagemapEntry::default(); PAGES as usize];
        let pagemap = Pagemap::open(puppet.pid()).unwrap();
        pagemap
            .read(puppet.memory.hva.unwrap(), &mut entries)
            .unwrap();
        let freed = book.sweep(PoolVm(vm), |_, page| {
            let entry = entries[page.0 as usize];
            uses_pool(entry.present(), entry.swapped(), entry.file_or_shared())
        });
        for hole in freed {
            file.punch_hole(hole.start.offset(), hole.len()).unwrap();
        }
    }
    let half = ByteLen(len.0 / 2);
    assert_eq!((file.allocated().unwrap(), book.live()), (half, half));
    for page in 0..PAGES as usize {
        let expected = if page < 32 { 201 } else { page + 1 };
        assert_eq!(usize::from(puppets[1].0.byte(page)), expected);
        assert_eq!(puppets[0].0.byte(page), 200);
    }
}

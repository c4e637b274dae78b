//! The table and its channel; items are claims. Run with `cargo bench -p index`.
//!
//! The table holds four million contents, more than the caches do; batches are of 64 contents,
//! in no order. Over TCP both ends are in this process, a core each.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::hint::black_box;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use divan::Bencher;
use divan::counter::ItemsCount;
use index::{Answer, Client, ClientNo, Groups, Item, Server, Table, TableKey};
use page::{ContentId, HostNo};

const KNOWN: u64 = 4 << 20;
const BATCH: usize = 64;

/// Batches that the client sends ahead of the answers.
const AHEAD: usize = 64;

const OVER_TCP: usize = 1 << 20;

fn main() {
    divan::main();
}

/// Uniform numbers, different ones for different `n` (`SplitMix64`).
fn mix(n: u64) -> u64 {
    let mut z = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

fn id(n: u64) -> ContentId {
    let (a, b) = (mix(n), mix(!n));
    ContentId((u128::from(a) << 64 | u128::from(b)).to_le_bytes())
}

fn items(numbers: std::ops::Range<u64>) -> Vec<Item> {
    let item = |n| Item {
        id: id(n),
        pages: 1,
    };
    numbers.map(item).collect()
}

/// Half of the contents are registered by one host, half by two.
fn prepared() -> Table {
    let (mut table, mut out) = (Table::new(1, 0), Vec::new());
    for (host, numbers) in [(0, 0..KNOWN / 4 * 3), (1, KNOWN / 4..KNOWN)] {
        for start in numbers.clone().step_by(4096) {
            out.clear();
            table.register(HostNo(host), &items(start..start + 4096), &mut out);
        }
    }
    table
}

/// Every second content is new.
fn mixed(batch: u64) -> Vec<ContentId> {
    let number = |i| match i % 2 {
        0 => mix(batch * 64 + i) % KNOWN,
        _ => KNOWN + batch * 64 + i,
    };
    (0..BATCH as u64).map(|i| id(number(i))).collect()
}

fn known(batch: u64) -> Vec<ContentId> {
    let number = |i| mix(batch * 64 + i) % KNOWN;
    (0..BATCH as u64).map(|i| id(number(i))).collect()
}

fn claim(bencher: Bencher<'_, '_>, batch_of: fn(u64) -> Vec<ContentId>) {
    let (table, next) = (RefCell::new(prepared()), RefCell::new(0));
    let mut verdicts = Vec::new();
    bencher
        .counter(ItemsCount::new(BATCH))
        .with_inputs(|| {
            *next.borrow_mut() += 1;
            batch_of(*next.borrow())
        })
        .bench_local_refs(|ids| {
            verdicts.clear();
            let mut table = table.borrow_mut();
            table.claim(HostNo(2), ClientNo(0), ids, &mut verdicts);
            black_box(verdicts.len())
        });
}

#[divan::bench(sample_count = 100, sample_size = 500)]
fn claim_known(bencher: Bencher<'_, '_>) {
    claim(bencher, known);
}

#[divan::bench(sample_count = 100, sample_size = 500)]
fn claim_known_and_new(bencher: Bencher<'_, '_>) {
    claim(bencher, mixed);
}

/// Two million contents into an empty table: with all doublings of its parts.
#[divan::bench(sample_count = 5, sample_size = 1)]
fn register(bencher: Bencher<'_, '_>) {
    let batches: Vec<_> = (0..2 << 20)
        .step_by(4096)
        .map(|n| items(n..n + 4096))
        .collect();
    bencher
        .counter(ItemsCount::new(2_usize << 20))
        .bench_local(|| {
            let (mut table, mut out) = (Table::new(1, 0), Vec::new());
            for batch in &batches {
                out.clear();
                table.register(HostNo(0), batch, &mut out);
            }
            table
        });
}

/// Serves one connection until its end.
fn serve(listener: &TcpListener) {
    let (mut stream, _) = listener.accept().expect("a client");
    stream.set_nodelay(true).expect("a TCP socket");
    let (mut groups, mut server) = (Groups::new(0), Server::new(1));
    let (mut input, mut out) = (vec![0; 64 << 10], Vec::new());
    loop {
        let read = stream.read(&mut input).expect("the client's bytes");
        if read == 0 {
            break;
        }
        server
            .handle(&mut groups, &input[..read], &mut out)
            .expect("valid messages");
        stream.write_all(&out).expect("a client that reads");
        out.clear();
    }
    server.closed(&mut groups, Duration::ZERO);
}

/// Claims batch by batch, some ahead of the answers; gives the number of answers.
fn ask(stream: &mut TcpStream, batches: &[Vec<ContentId>]) -> usize {
    let (mut client, mut out, mut input) = (Client::new(), Vec::new(), vec![0; 64 << 10]);
    client.join(
        TableKey {
            group: "bench".into(),
            domain: [0; 16],
        },
        &mut out,
    );
    let mut todo: VecDeque<_> = batches.iter().collect();
    let mut answered = 0;
    while !todo.is_empty() || client.waiting() > 0 {
        while client.waiting() < AHEAD
            && let Some(ids) = todo.pop_front()
        {
            client.claim(HostNo(0), ids, &mut out);
        }
        stream.write_all(&out).expect("a server that reads");
        out.clear();
        let read = stream.read(&mut input).expect("the server's bytes");
        client.handle(&input[..read]);
        while let Some((_, answer)) = client.poll_answer().expect("valid answers") {
            if let Answer::Verdicts(verdicts) = answer {
                answered += verdicts.len();
            }
        }
    }
    answered
}

/// One connection, each content claimed twice.
#[divan::bench(sample_count = 5, sample_size = 1)]
fn claim_over_loopback(bencher: Bencher<'_, '_>) {
    let batches: Vec<Vec<_>> = (0..OVER_TCP as u64)
        .step_by(BATCH)
        .map(|n| (n / 2..n / 2 + BATCH as u64).map(id).collect())
        .collect();
    bencher.counter(ItemsCount::new(OVER_TCP)).bench_local(|| {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound socket");
        let server = thread::spawn(move || serve(&listener));
        let mut stream = TcpStream::connect(address).expect("the server");
        stream.set_nodelay(true).expect("a TCP socket");
        assert_eq!(ask(&mut stream, &batches), OVER_TCP);
        drop(stream);
        server.join().expect("a server that ends well");
    });
}

//! Applications that use the network of the rack, over the guest's second card.
//!
//! A counter goes up with each transaction or piece of work, and every heartbeat says it, so that
//! the lab sees the throughput from outside. The programs that are not our own tell their clients.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use lab_init::agreed::{IPERF_FIRST_PORT, NFS_PIECE};
use rustix::mount::{MountFlags, mount};

use crate::heartbeat::Health;
use crate::settings::{Mode, Settings};
use crate::system;
use crate::workload::spawn;

/// Port of the request-response test.
const RR_PORT: u16 = 5001;
/// Time before something that ended, or was refused, is tried again.
const AGAIN: Duration = Duration::from_millis(500);
/// A request that got no answer for so long has lost its connection.
const SILENCE: Duration = Duration::from_secs(30);
/// Pieces of a file: 100 MB, as in section 3.3 of the IRLM paper.
const NFS_PIECES: usize = 400;
const NFS_MODULES: &str = "/lib/modules/load-nfs";
const NFS_DIR: &str = "/mnt";

/// Starts the application of the guest's mode, if it has one.
pub(crate) fn start(settings: &Settings, health: &Arc<Health>) -> anyhow::Result<()> {
    let own = settings.clone();
    match settings.mode {
        Mode::TcpRr => {
            let listener = TcpListener::bind(("0.0.0.0", RR_PORT)).context("listening")?;
            spawn("answer", health, move |_| answer_for_ever(&listener))?;
            if let Some(peer) = settings.peer {
                spawn("ask", health, move |health| ask_for_ever(peer, health))?;
            }
        }
        Mode::Nfs => {
            system::load_modules(NFS_MODULES)?;
            let server = settings.server.context("lab.server is missing")?;
            let id = settings.id.clone();
            mount_nfs(server, settings).context("mounting from the NFS server")?;
            spawn("write", health, move |health| write_for_ever(&id, health))?;
        }
        Mode::Iperf3 => {
            let server = settings.server.context("lab.server is missing")?;
            let port = IPERF_FIRST_PORT + settings.number;
            spawn("iperf3", health, move |_| {
                run_for_ever("/usr/bin/iperf3", &iperf_arguments(server, port));
            })?;
        }
        Mode::Redis | Mode::RedisCluster => {
            spawn("redis", health, move |_| {
                run_for_ever("/usr/bin/redis-server", &redis_arguments(&own));
            })?;
        }
        _ => {}
    }
    Ok(())
}

fn iperf_arguments(server: Ipv4Addr, port: u32) -> Vec<String> {
    let words = format!("-c {server} -p {port} -t 86400 -i 0");
    words.split(' ').map(str::to_owned).collect()
}

/// Nothing is kept on a disk, and a node is not given up for a pause of some seconds: what Redis
/// itself has as default.
fn redis_arguments(settings: &Settings) -> Vec<String> {
    let mut words = "--bind 0.0.0.0 --port 6379 --protected-mode no --appendonly no --dir /tmp \
                     --save"
        .split_whitespace()
        .map(str::to_owned)
        .collect::<Vec<_>>();
    words.push(String::new());
    if settings.mode == Mode::RedisCluster {
        let cluster = "--cluster-enabled yes --cluster-config-file /tmp/nodes.conf \
                       --cluster-node-timeout 15000";
        words.extend(cluster.split_whitespace().map(str::to_owned));
    }
    words
}

/// Runs a program again whenever it ends.
fn run_for_ever(program: &str, arguments: &[String]) {
    loop {
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn();
        match child {
            // PID 1 may have collected it before; it has ended in either case.
            Ok(mut child) => drop(child.wait()),
            Err(error) => eprintln!("lab-init: starting {program}: {error}"),
        }
        std::thread::sleep(AGAIN);
    }
}

fn answer_for_ever(listener: &TcpListener) {
    for stream in listener.incoming().flatten() {
        // One thread for each connection: a guest has one partner.
        let _ = std::thread::Builder::new()
            .name("echo".into())
            .spawn(move || echo(stream));
    }
}

fn echo(mut stream: TcpStream) {
    let mut byte = [0];
    let _ = stream.set_nodelay(true);
    while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
}

fn ask_for_ever(peer: Ipv4Addr, health: &Health) {
    loop {
        if let Ok(stream) = TcpStream::connect((peer, RR_PORT)) {
            // It ends with the connection, which is then made again.
            let _ = ask(stream, health);
        }
        std::thread::sleep(AGAIN);
    }
}

fn ask(mut stream: TcpStream, health: &Health) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(SILENCE))?;
    let mut byte = [1];
    loop {
        let began = Instant::now();
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
        health.done(began.elapsed());
    }
}

fn mount_nfs(server: Ipv4Addr, settings: &Settings) -> anyhow::Result<()> {
    std::fs::create_dir_all(NFS_DIR).context("making its directory")?;
    let own = settings.rack_ip.context("lab.rack_ip is missing")?;
    let options = format!("addr={server},clientaddr={own},vers=4.1,proto=tcp,hard,sec=sys");
    let options = std::ffi::CString::new(options).context("writing its options")?;
    let patience = Instant::now() + SILENCE;
    loop {
        let mounted = mount(
            format!("{server}:/lab"),
            NFS_DIR,
            "nfs4",
            MountFlags::empty(),
            Some(options.as_c_str()),
        );
        match mounted {
            // The server may still be starting.
            Err(_) if Instant::now() < patience => std::thread::sleep(AGAIN),
            done => return done.context("mount"),
        }
    }
}

fn write_for_ever(id: &str, health: &Health) {
    let piece = vec![0x5a; NFS_PIECE];
    loop {
        if let Err(error) = write_file(id, &piece, health) {
            eprintln!("lab-init: writing over NFS: {error:#}");
            std::thread::sleep(AGAIN);
        }
    }
}

fn write_file(id: &str, piece: &[u8], health: &Health) -> anyhow::Result<()> {
    let mut file = File::create(format!("{NFS_DIR}/{id}")).context("creating a file")?;
    for _ in 0..NFS_PIECES {
        let began = Instant::now();
        let written = file.write(piece).context("writing")?;
        ensure!(written == piece.len(), "a write was cut short");
        file.sync_data().context("waiting for the server")?;
        health.done(began.elapsed());
    }
    Ok(())
}

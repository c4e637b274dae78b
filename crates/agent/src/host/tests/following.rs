//! Memory that follows a VM over a way that is cut.

use std::net::{TcpListener, TcpStream};

use super::*;

/// A way between the agents that can be cut.
struct Cable {
    address: SocketAddr,
    is_cut: Arc<std::sync::atomic::AtomicBool>,
    through: Arc<Mutex<Vec<TcpStream>>>,
}

impl Cable {
    fn to(target: SocketAddr) -> Self {
        use std::sync::atomic::Ordering::Relaxed;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let cable = Self {
            address: listener.local_addr().unwrap(),
            is_cut: Arc::default(),
            through: Arc::default(),
        };
        let (is_cut, through) = (Arc::clone(&cable.is_cut), Arc::clone(&cable.through));
        std::thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                if is_cut.load(Relaxed) {
                    continue;
                }
                let far = TcpStream::connect(target).unwrap();
                for (from, to) in [(&near, &far), (&far, &near)] {
                    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    std::thread::spawn(move || {
                        let _ = std::io::copy(&mut from, &mut to);
                        let _ = to.shutdown(std::net::Shutdown::Both);
                    });
                }
                lock(&through).extend([near, far]);
            }
        });
        cable
    }

    /// Waits until somebody is connected through it.
    fn wait_used(&self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while lock(&self.through).is_empty() {
            assert!(Instant::now() < deadline, "nobody connects");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn set_cut(&self, is_cut: bool) {
        self.is_cut
            .store(is_cut, std::sync::atomic::Ordering::Relaxed);
        for socket in lock(&self.through).drain(..) {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }
}

/// A VM whose memory takes half a minute to follow it, over a cable.
fn following(agents: &Agents, data: &Path) -> (Vm, Cable, Receiver<Happening>) {
    let vm = vm(agents.dir.path(), "v", data, &[]);
    let cable = Cable::to(agents.target_bulk);
    let (sink, receiver) = events();
    let mode = Mode::PostCopy;
    let settings = Settings {
        mode,
        ..Preset::Gang.settings()
    };
    let spec = MoveSpec {
        target_bulk: cable.address.to_string(),
        max_bandwidth_bytes_per_s: Some(500_000),
        confirm_handover: false,
        ..agents.spec(&vm, settings)
    };
    agents.source.start(spec, sink).unwrap();
    wait_for(&receiver, Phase::PostCopy);
    (vm, cable, receiver)
}

/// That the rest of the memory comes, and what QEMU's loader put there at the source is in it.
fn assert_arrives(agents: &Agents, (vm, receiver): (&Vm, &Receiver<Happening>), data: &Path) {
    let unlimited = Bandwidth::default();
    agents.source.set_bandwidth("g/v", unlimited).unwrap();
    wait_for(receiver, Phase::Moved);
    let (loaded, after) = (std::fs::read(data).unwrap(), target_memory(agents, vm));
    assert!(
        after[16 << 20..][..loaded.len()] == loaded[..],
        "pages differ"
    );
}

#[test]
fn real_memory_goes_on_following_its_vm_when_a_cut_cable_is_mended() {
    let agents = agents();
    let data = test_data(agents.dir.path(), 11);
    let (vm, cable, receiver) = following(&agents, &data);
    // Twice: what was resumed can be lost again, and it is tried in vain before it succeeds.
    for _ in 0..2 {
        std::thread::sleep(Duration::from_millis(300));
        cable.set_cut(true);
        let (_, message) = wait_for(&receiver, Phase::Recovering);
        assert!(message.contains("neither QEMU must be ended"), "{message}");
        std::thread::sleep(Duration::from_secs(1));
        cable.set_cut(false);
        wait_for(&receiver, Phase::PostCopy);
    }
    assert_arrives(&agents, (&vm, &receiver), &data);
    // Its monitor is free again, and it could go on to another host.
    let (guest, _events) = SourceGuest::attach(&moved_qmp(&vm)).unwrap();
    assert_eq!(guest.run_state().unwrap(), guest::RunState::Running);
    guest.check().unwrap();
    guest.quit().unwrap();
    assert!(agents.target.incoming().is_empty());
}

#[test]
fn real_memory_goes_on_following_its_vm_when_its_resumption_is_cut_again() {
    let agents = agents();
    let data = test_data(agents.dir.path(), 13);
    let (vm, cable, receiver) = following(&agents, &data);
    cable.set_cut(true);
    wait_for(&receiver, Phase::Recovering);
    // From the first connection on until long after both QEMUs have agreed, which takes some 30 ms.
    for after_ms in [1, 5, 15, 30, 100] {
        cable.set_cut(false);
        cable.wait_used();
        std::thread::sleep(Duration::from_millis(after_ms));
        cable.set_cut(true);
    }
    cable.set_cut(false);
    assert_arrives(&agents, (&vm, &receiver), &data);
}

#[test]
fn real_memory_goes_on_following_its_vm_when_a_person_says_so_after_the_limit() {
    let agents = agents_set("recovery_limit_s = 1\n");
    let data = test_data(agents.dir.path(), 14);
    let (vm, cable, receiver) = following(&agents, &data);
    cable.set_cut(true);
    wait_for(&receiver, Phase::Recovering);
    let (_, message) = wait_for(&receiver, Phase::NeedsPerson);
    assert!(message.contains("`gangway recover g --vm v`"), "{message}");
    // In vain, and then not.
    let again = || {
        let (sink, receiver) = events();
        agents.source.recover("g/v", sink).unwrap();
        receiver
    };
    wait_for(&again(), Phase::NeedsPerson);
    cable.set_cut(false);
    let receiver = again();
    wait_for(&receiver, Phase::PostCopy);
    assert_arrives(&agents, (&vm, &receiver), &data);
}

#[test]
fn real_a_vm_that_is_killed_while_its_memory_follows_is_called_killed() {
    let agents = agents();
    let data = test_data(agents.dir.path(), 12);
    let (mut vm, _cable, receiver) = following(&agents, &data);
    let pid = agents.target.arrivals.pid_of("g/v").unwrap();
    sys::Process::open(pid).unwrap().kill().unwrap();
    let (_, message) = wait_for(&receiver, Phase::NeedsPerson);
    assert!(message.contains("killed in post-copy"), "{message}");
    assert!(
        vm.child.try_wait().unwrap().is_none(),
        "its source is there"
    );
}

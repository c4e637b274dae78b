//! Agents for tests: the real API around a [`FakeHost`], in a directory of their own.

#![expect(
    clippy::unwrap_used,
    reason = "test support: a failed set-up must stop the test"
)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;

use super::fake::FakeHost;
use super::server::{Agent, ServeError};
use crate::client::Client;
use crate::config::Config;
use crate::tls::Tls;
use crate::types::{Host, Plan, PlanMove};

/// Calls in tests fail sooner than in life.
pub const TIMEOUT: Duration = Duration::from_secs(5);

/// A running agent around a host in memory.
pub struct TestAgent {
    /// The host.
    pub host: Arc<FakeHost>,
    /// Its configuration.
    pub config: Config,
    agent: Option<Agent>,
    dir: TempDir,
}

impl TestAgent {
    /// Starts an agent; with a directory of certificates its TCP port speaks mutual TLS.
    ///
    /// # Panics
    /// If it cannot be started.
    pub async fn start(host: FakeHost, tls_dir: Option<&Path>) -> Self {
        // Not under TMPDIR: a unix socket's path is short.
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let tls = match tls_dir {
            Some(tls_dir) => format!("tls_dir = {tls_dir:?}"),
            None => "insecure_plaintext = true".to_owned(),
        };
        let text = format!(
            "name = \"test\"\nrun_dir = {:?}\nstate_dir = {:?}\nbulk = \"127.0.0.1:1\"\n\
             control = \"127.0.0.1:0\"\npeer_timeout_s = 5\n{tls}\n",
            dir.path(),
            dir.path().join("state"),
        );
        let config = Config::parse(Path::new("agent.toml"), &text).unwrap();
        let mut agent = Self {
            host: Arc::new(host),
            config,
            agent: None,
            dir,
        };
        agent.start_again().await.unwrap();
        agent
    }

    /// Starts the agent on the same host, directories and port, after [`Self::kill`].
    ///
    /// # Errors
    /// As [`Agent::start`].
    pub async fn start_again(&mut self) -> Result<(), ServeError> {
        let tls = self
            .config
            .tls_dir
            .as_deref()
            .map(|dir| Tls::load(dir).unwrap());
        let agent = Agent::start(&self.config, tls, self.host.clone()).await?;
        // The port stays the same over restarts.
        self.config.control = agent.control_address();
        self.agent = Some(agent);
        Ok(())
    }

    /// Ends the agent's listeners at once, as a kill would, leaving its socket behind.
    pub async fn kill(&mut self) {
        if let Some(agent) = self.agent.take() {
            agent.leave().await;
        }
    }

    /// Kills the agent and gives it another host for its next start.
    pub async fn replace_host(&mut self, host: FakeHost) {
        self.kill().await;
        self.host = Arc::new(host);
    }

    /// Stops the agent in order.
    pub async fn stop(&mut self) {
        if let Some(agent) = self.agent.take() {
            agent.stop().await;
        }
    }

    /// A client of its unix socket.
    #[must_use]
    pub fn client(&self) -> Client {
        Client::unix(&self.socket(), TIMEOUT)
    }

    /// Its unix socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.config.control_socket()
    }

    /// A directory for the test's files.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Its addresses as a plan has them. The bulk address is only a name here.
    #[must_use]
    pub fn addresses(&self) -> Host {
        let control = self
            .config
            .control
            .map(|address| address.to_string())
            .unwrap_or_default();
        let bulk = control.replace("127.0.0.1", "127.0.0.2");
        Host { control, bulk }
    }
}

/// A plan of host `a` and host `b`, moving VMs in the given directions.
#[must_use]
pub fn plan(a: &TestAgent, b: &TestAgent, moves: &[(&str, &str, &str)]) -> Plan {
    let one = |&(vm, from, to): &(&str, &str, &str)| PlanMove {
        vm: vm.to_owned(),
        from: from.to_owned(),
        to: to.to_owned(),
        qmp: PathBuf::from(format!("/run/{vm}.qmp")),
        replace: Vec::new(),
        definition: None,
        max_bandwidth_bytes_per_s: None,
        domain: None,
    };
    Plan {
        preset: None,
        scope: None,
        sharing: None,
        compression: None,
        mode: None,
        max_bandwidth_bytes_per_s: None,
        downtime_limit_ms: None,
        postcopy_after_s: None,
        postcopy_preempt: false,
        confirm_handover: false,
        prepare: None,
        index: Vec::new(),
        hosts: [
            ("a".to_owned(), a.addresses()),
            ("b".to_owned(), b.addresses()),
        ]
        .into(),
        moves: moves.iter().map(one).collect(),
        seed_from_target: false,
        residents: Vec::new(),
    }
}

/// Writes a CA and, signed by it, a server's and a client's certificate with their keys, under
/// the names that [`crate::tls::Tls::load`] reads.
///
/// # Panics
/// If a file cannot be written.
pub fn write_certificates(dir: &Path, server_names: &[&str]) {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

    let ca_key = KeyPair::generate().unwrap();
    let mut ca = CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_pem = ca.self_signed(&ca_key).unwrap().pem();
    let issuer = Issuer::new(ca, ca_key);
    let write = |name: &str, text: String| std::fs::write(dir.join(name), text).unwrap();
    write("ca-cert.pem", ca_pem);
    for (role, names) in [("server", server_names), ("client", &["agent"][..])] {
        let names = names
            .iter()
            .map(|&name| name.to_owned())
            .collect::<Vec<_>>();
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(names)
            .unwrap()
            .signed_by(&key, &issuer)
            .unwrap();
        write(&format!("{role}-cert.pem"), certificate.pem());
        write(&format!("{role}-key.pem"), key.serialize_pem());
    }
}

//! Mutual TLS between agents, for the control API and the bulk path alike.
//!
//! Both ends show a certificate and check the other's against the same CA; the client also checks
//! that the server's certificate is for the host or address that it dialled. TLS 1.3 only: both
//! ends are ours.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

/// Both directions' configurations.
#[derive(Clone, Debug)]
pub struct Tls {
    /// For listeners. It sends no session tickets: agents never resume, and a bulk peer that
    /// only writes would not read them.
    pub server: Arc<ServerConfig>,
    /// For dialling.
    pub client: Arc<ClientConfig>,
}

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is missing or unreadable, or has no PEM item of the kind that it should have.
    #[error("cannot read {} from {}", what, path.display())]
    File {
        /// Certificate or key.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: rustls::pki_types::pem::Error,
    },
    /// The file has no certificate at all.
    #[error("{} holds no certificate", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The pieces do not fit: a key of another certificate, a certificate of another CA.
    #[error("{} cannot be used", path.display())]
    Unusable {
        /// The file at fault.
        path: PathBuf,
        /// What is wrong.
        source: rustls::Error,
    },
    /// The CA's certificate does not serve to check clients.
    #[error("{} cannot be used to check clients", path.display())]
    Ca {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: rustls::server::VerifierBuilderError,
    },
}

impl Tls {
    /// Loads `ca-cert.pem`, `server-cert.pem`, `server-key.pem`, `client-cert.pem` and
    /// `client-key.pem`, and checks that they belong together.
    pub fn load(dir: &Path) -> Result<Self, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let versions = &[&rustls::version::TLS13];
        let unusable = |name: &str| {
            let path = dir.join(name);
            move |source| TlsError::Unusable { path, source }
        };
        let roots = Arc::new(roots(dir)?);
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|source| TlsError::Ca {
                path: dir.join("ca-cert.pem"),
                source,
            })?;

        let (client_chain, client_key) = identity(dir, "client-cert.pem", "client-key.pem")?;
        let (end, intermediates) = client_chain.split_first().ok_or_else(|| TlsError::Empty {
            path: dir.join("client-cert.pem"),
        })?;
        verifier
            .verify_client_cert(end, intermediates, UnixTime::now())
            .map_err(unusable("client-cert.pem"))?;
        let client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(versions)
            .map_err(unusable("client-cert.pem"))?
            .with_root_certificates(roots)
            .with_client_auth_cert(client_chain, client_key)
            .map_err(unusable("client-key.pem"))?;

        let (server_chain, server_key) = identity(dir, "server-cert.pem", "server-key.pem")?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(unusable("server-cert.pem"))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(server_chain, server_key)
            .map_err(unusable("server-key.pem"))?;
        server.send_tls13_tickets = 0;
        Ok(Self {
            server: Arc::new(server),
            client: Arc::new(client),
        })
    }
}

/// The name that a server's certificate must have for an address `HOST:PORT`; `None` if the
/// address is malformed.
#[must_use]
pub fn server_name(address: &str) -> Option<ServerName<'static>> {
    let (host, _) = crate::plan::host_and_port(address)?;
    ServerName::try_from(host.to_owned()).ok()
}

fn roots(dir: &Path) -> Result<RootCertStore, TlsError> {
    let path = dir.join("ca-cert.pem");
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&path)? {
        roots
            .add(certificate)
            .map_err(|source| TlsError::Unusable {
                path: path.clone(),
                source,
            })?;
    }
    Ok(roots)
}

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn identity(dir: &Path, chain: &str, key: &str) -> Result<Identity, TlsError> {
    let path = dir.join(key);
    let key = PrivateKeyDer::from_pem_file(&path).map_err(|source| TlsError::File {
        what: "a private key",
        path,
        source,
    })?;
    Ok((certificates(&dir.join(chain))?, key))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let unreadable = |source| TlsError::File {
        what: "a certificate",
        path: path.to_owned(),
        source,
    };
    let chain: Vec<_> = CertificateDer::pem_file_iter(path)
        .map_err(unreadable)?
        .collect::<Result<_, _>>()
        .map_err(unreadable)?;
    if chain.is_empty() {
        return Err(TlsError::Empty {
            path: path.to_owned(),
        });
    }
    Ok(chain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::testing::write_certificates;

    #[test]
    fn a_complete_directory_loads() {
        let dir = tempfile::tempdir().unwrap();
        write_certificates(dir.path(), &["127.0.0.1"]);
        let tls = Tls::load(dir.path()).unwrap();
        assert_eq!(tls.server.send_tls13_tickets, 0);
    }

    #[test]
    fn a_missing_file_is_named() {
        for name in [
            "ca-cert.pem",
            "server-cert.pem",
            "server-key.pem",
            "client-cert.pem",
            "client-key.pem",
        ] {
            let dir = tempfile::tempdir().unwrap();
            write_certificates(dir.path(), &["127.0.0.1"]);
            std::fs::remove_file(dir.path().join(name)).unwrap();
            let error = Tls::load(dir.path()).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn a_key_of_another_certificate_and_a_certificate_of_another_ca_are_named() {
        let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for name in ["server-key.pem", "client-key.pem", "client-cert.pem"] {
            write_certificates(ours.path(), &["127.0.0.1"]);
            write_certificates(theirs.path(), &["127.0.0.1"]);
            std::fs::copy(theirs.path().join(name), ours.path().join(name)).unwrap();
            let error = Tls::load(ours.path()).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn the_servers_name_is_the_host_of_the_address() {
        assert_eq!(server_name("[::1]:7"), ServerName::try_from("::1").ok());
        assert_eq!(
            server_name("a.example:7"),
            ServerName::try_from("a.example").ok()
        );
        assert_eq!(server_name("a.example"), None);
    }
}

//! Certificates of a run: one authority, and for each host the files that QEMU and libvirt name so.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use anyhow::Context;
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

/// The authority that all agents of a run trust.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
}

impl Authority {
    /// Makes a new one. Its key lives only in this process.
    pub fn new() -> anyhow::Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, "lab authority");
        let key = KeyPair::generate()?;
        let certificate = params
            .self_signed(&key)
            .context("signing the authority")?
            .pem();
        Ok(Self {
            issuer: Issuer::new(params, key),
            certificate,
        })
    }

    /// Writes the five files of the host `name` with the address `ip` into `dir`.
    pub fn equip(&self, dir: &Path, name: &str, ip: Ipv4Addr) -> anyhow::Result<()> {
        std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        let write = |file: &str, text: &str| {
            std::fs::write(dir.join(file), text).with_context(|| format!("writing {file}"))
        };
        write("ca-cert.pem", &self.certificate)?;
        for (role, usage) in [
            ("server", ExtendedKeyUsagePurpose::ServerAuth),
            ("client", ExtendedKeyUsagePurpose::ClientAuth),
        ] {
            let mut params = CertificateParams::new(vec![name.to_owned()])?;
            params
                .subject_alt_names
                .push(SanType::IpAddress(IpAddr::V4(ip)));
            params.extended_key_usages = vec![usage];
            params
                .distinguished_name
                .push(rcgen::DnType::CommonName, name);
            let key = KeyPair::generate()?;
            let certificate = params.signed_by(&key, &self.issuer).context("signing")?;
            write(&format!("{role}-cert.pem"), &certificate.pem())?;
            write(&format!("{role}-key.pem"), &key.serialize_pem())?;
        }
        Ok(())
    }
}

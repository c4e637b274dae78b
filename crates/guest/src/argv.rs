//! QEMU command lines: from the source's to the target's.
//!
//! A command line is text that people and managers wrote: what is not understood stays as it is.

use std::path::PathBuf;

use serde_json::Value;

/// Why a command line cannot start a target.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArgvError {
    /// There is not even a program.
    #[error("the command line is empty")]
    Empty,
    /// A replacement of the empty text.
    #[error("a replacement has an empty text to look for")]
    EmptyPattern,
    /// Descriptors that the source's starter opened do not exist at the target.
    #[error(
        "{argument:?} names a file descriptor that the VM's starter passed in, which the target \
         host does not have; replace it by a path, or give the move a definition of its own"
    )]
    PassedDescriptor {
        /// The argument, after the replacements.
        argument: String,
    },
    /// Disk writes of the source lie in a temporary file that only its process sees.
    #[error(
        "{argument:?} keeps disk writes in a temporary file of the source process; such a VM \
         cannot move to another host"
    )]
    Snapshot {
        /// The argument.
        argument: String,
    },
}

/// Options that say how this one process starts, not what the VM is, and how many arguments
/// each takes. A target is started paused and receiving, in the foreground of its own session.
const START_OPTIONS: [(&str, usize); 5] = [
    ("S", 0),
    ("daemonize", 0),
    ("preconfig", 0),
    ("incoming", 1),
    ("loadvm", 1),
];

/// Options whose value is free text and holds no `key=value` of QEMU's.
const TEXT_OPTIONS: [&str; 2] = ["append", "name"];

/// Keys whose value is a number of an open descriptor.
const DESCRIPTOR_KEYS: [&str; 4] = ["fd", "fds", "vhostfd", "vhostfds"];

/// The target's command line, made from the source's: every `(from, to)` of `replace` applied, in
/// order, to every argument; without what concerns the start of the source alone (`-incoming`,
/// `-S`, `-loadvm`, `-daemonize`, `-preconfig`). Sandbox options and `-pidfile` are kept.
///
/// The result is for [`crate::TargetGuest::start`], which adds `-S -incoming defer`. The machine
/// type is the source's as long as `source_argv` names it with its version, as
/// [`crate::SourceGuest::argv`] does.
///
/// # Errors
/// If the line is empty or has parts that mean nothing on another host; see [`ArgvError`].
pub fn target_argv(
    source_argv: &[String],
    replace: &[(String, String)],
) -> Result<Vec<String>, ArgvError> {
    if replace.iter().any(|(from, _)| from.is_empty()) {
        return Err(ArgvError::EmptyPattern);
    }
    let replaced: Vec<String> = source_argv
        .iter()
        .map(|argument| {
            replace
                .iter()
                .fold(argument.clone(), |text, (from, to)| text.replace(from, to))
        })
        .collect();
    let argv = without_start_options(&replaced)?;
    for option in options(&argv) {
        refuse_local_state(&option)?;
    }
    Ok(argv)
}

/// `argv` without the options that say how the process starts.
pub(crate) fn without_start_options(argv: &[String]) -> Result<Vec<String>, ArgvError> {
    let (program, _) = argv.split_first().ok_or(ArgvError::Empty)?;
    let mut kept = vec![program.clone()];
    let mut next = 1;
    for option in options(argv) {
        let start = START_OPTIONS.iter().find(|(name, _)| *name == option.name);
        if let Some((_, values)) = start {
            kept.extend_from_slice(&argv[next..option.index]);
            next = option.index + 1 + if option.value.is_some() { *values } else { 0 };
        }
    }
    kept.extend_from_slice(&argv[next..]);
    Ok(kept)
}

/// `argv` with `machine_type` (a versioned one, `pc-i440fx-10.0`) in place of whatever name its
/// `-machine` options give; added if there is none. An alias such as `pc` means another machine
/// in each version of QEMU.
#[must_use]
pub fn pin_machine(argv: &[String], machine_type: &str) -> Vec<String> {
    let mut pinned = argv.to_vec();
    let mut named = false;
    for option in options(argv) {
        let ("machine" | "M", Some(value)) = (option.name, option.value) else {
            continue;
        };
        let mut settings = split_settings(value);
        for (position, setting) in settings.iter_mut().enumerate() {
            let first_is_name = position == 0 && !setting.contains('=');
            if first_is_name || setting.starts_with("type=") {
                *setting = machine_type.to_owned();
                // Only the first place has an implied key.
                if position > 0 {
                    setting.insert_str(0, "type=");
                }
                named = true;
            }
        }
        pinned[option.index + 1] = join_settings(&settings);
    }
    if !named {
        pinned.extend(["-machine".to_owned(), machine_type.to_owned()]);
    }
    pinned
}

/// The path of the first QMP unix socket on which this command line makes QEMU listen: `-qmp
/// unix:PATH,server=on`, or `-mon chardev=ID,mode=control` with its `-chardev socket`.
#[must_use]
pub fn qmp_socket(argv: &[String]) -> Option<PathBuf> {
    options(argv).find_map(|option| {
        let value = option.value?;
        match option.name {
            "qmp" | "qmp-pretty" => match value.strip_prefix("chardev:") {
                Some(id) => chardev_socket(argv, id),
                None => listening_path(&split_settings(value.strip_prefix("unix:")?), |first| {
                    Some(first)
                }),
            },
            "mon" => {
                let settings = split_settings(value);
                let implied = settings.first().filter(|first| !first.contains('='));
                let id = setting(&settings, "chardev").or(implied.map(String::as_str))?;
                (setting(&settings, "mode") == Some("control"))
                    .then(|| chardev_socket(argv, id))
                    .flatten()
            }
            _ => None,
        }
    })
}

/// The path on which the character device `id` listens.
fn chardev_socket(argv: &[String], id: &str) -> Option<PathBuf> {
    options(argv)
        .filter(|option| option.name == "chardev")
        .find_map(|option| {
            let settings = split_settings(option.value?);
            let is_it = settings.first()? == "socket" && setting(&settings, "id") == Some(id);
            is_it
                .then(|| listening_path(&settings, |_| setting(&settings, "path")))
                .flatten()
        })
}

/// The path among `settings` (told by `path` from the first of them) if they say `server`.
fn listening_path<'a>(
    settings: &'a [String],
    path: impl FnOnce(&'a str) -> Option<&'a str>,
) -> Option<PathBuf> {
    let server = settings.iter().any(|setting| {
        matches!(
            setting.as_str(),
            "server" | "server=on" | "server=yes" | "server=true"
        )
    });
    let path = path(settings.first()?)?;
    (server && !path.is_empty()).then(|| PathBuf::from(path))
}

pub(crate) fn setting<'a>(settings: &'a [String], key: &str) -> Option<&'a str> {
    settings
        .iter()
        .find_map(|setting| setting.strip_prefix(key)?.strip_prefix('='))
}

/// One option of a command line, with the argument behind it if that can be its value.
pub(crate) struct CommandOption<'a> {
    /// Position of the option's name.
    index: usize,
    /// Without its dashes.
    pub(crate) name: &'a str,
    pub(crate) value: Option<&'a str>,
}

/// The options of a command line. Which options take a value is told by the next argument: one
/// that starts with a dash is an option again, except where free text stands.
pub(crate) fn options(argv: &[String]) -> impl Iterator<Item = CommandOption<'_>> {
    let mut index = 0;
    std::iter::from_fn(move || {
        loop {
            index += 1;
            let argument = argv.get(index)?;
            let Some(name) = argument.strip_prefix('-') else {
                continue;
            };
            let name = name.strip_prefix('-').unwrap_or(name);
            let value = argv.get(index + 1).map(String::as_str);
            let value = value.filter(|v| TEXT_OPTIONS.contains(&name) || !v.starts_with('-'));
            let option = CommandOption { index, name, value };
            index += usize::from(option.value.is_some());
            return Some(option);
        }
    })
}

fn refuse_local_state(option: &CommandOption<'_>) -> Result<(), ArgvError> {
    let value = option.value.unwrap_or_default();
    let argument = || format!("-{} {value}", option.name).trim_end().to_owned();
    if option.name == "snapshot" {
        return Err(ArgvError::Snapshot {
            argument: argument(),
        });
    }
    if TEXT_OPTIONS.contains(&option.name) {
        return Ok(());
    }
    if option.name == "add-fd" || value.contains("/dev/fdset/") || has_descriptor(value) {
        return Err(ArgvError::PassedDescriptor {
            argument: argument(),
        });
    }
    let settings = split_settings(value);
    if option.name == "drive" && setting(&settings, "snapshot").is_some_and(|v| v != "off") {
        return Err(ArgvError::Snapshot {
            argument: argument(),
        });
    }
    Ok(())
}

/// Whether a value, in either of QEMU's notations, names an open descriptor.
fn has_descriptor(value: &str) -> bool {
    if value.starts_with('{') {
        return serde_json::from_str(value).is_ok_and(|json| json_has_descriptor(&json));
    }
    split_settings(value)
        .iter()
        .filter_map(|setting| setting.split_once('='))
        .any(|(key, _)| is_descriptor_key(key))
}

/// The parser has limited the depth.
fn json_has_descriptor(json: &Value) -> bool {
    match json {
        Value::Object(members) => members
            .iter()
            .any(|(key, value)| is_descriptor_key(key) || json_has_descriptor(value)),
        Value::Array(items) => items.iter().any(json_has_descriptor),
        _ => false,
    }
}

fn is_descriptor_key(key: &str) -> bool {
    let last = key.rsplit('.').next().unwrap_or(key);
    DESCRIPTOR_KEYS.contains(&last)
}

/// Splits QEMU's `a,b=c` at its commas; a doubled comma is one of the text.
pub(crate) fn split_settings(value: &str) -> Vec<String> {
    let mut settings = Vec::new();
    let mut setting = String::new();
    let mut chars = value.chars().peekable();
    while let Some(char) = chars.next() {
        if char == ',' && chars.next_if_eq(&',').is_none() {
            settings.push(std::mem::take(&mut setting));
        } else {
            setting.push(char);
        }
    }
    settings.push(setting);
    settings
}

fn join_settings(settings: &[String]) -> String {
    settings
        .iter()
        .map(|setting| setting.replace(',', ",,"))
        .collect::<Vec<_>>()
        .join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn argv(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    fn replace(from: &str, to: &str) -> (String, String) {
        (from.to_owned(), to.to_owned())
    }

    #[test]
    fn replacements_apply_in_order_to_every_argument() {
        let source = argv("qemu -qmp unix:/run/a/qmp,server -drive file=/run/a/disk");
        let rules = [replace("/run/a/", "/run/b/"), replace("b/disk", "c/disk")];
        let target = target_argv(&source, &rules).unwrap();
        assert_eq!(
            target,
            argv("qemu -qmp unix:/run/b/qmp,server -drive file=/run/c/disk")
        );
        assert_eq!(
            target_argv(&source, &[replace("", "x")]),
            Err(ArgvError::EmptyPattern)
        );
        assert_eq!(target_argv(&[], &[]), Err(ArgvError::Empty));
    }

    #[test]
    fn what_concerns_the_sources_own_start_is_left_out() {
        let source = argv(
            "qemu -S --incoming defer -m 64M -daemonize -pidfile /run/p -loadvm x -sandbox on,spawn=deny \
             -preconfig -S disk.img -incoming",
        );
        let target = target_argv(&source, &[]).unwrap();
        assert_eq!(
            target,
            argv("qemu -m 64M -pidfile /run/p -sandbox on,spawn=deny disk.img")
        );
    }

    #[test]
    fn free_text_is_never_taken_for_an_option() {
        let source = ["qemu", "-append", "-S", "-name", "fd=3", "-m", "1G"].map(str::to_owned);
        assert_eq!(target_argv(&source, &[]).unwrap(), source);
    }

    #[test]
    fn passed_descriptors_are_refused_with_the_argument() {
        for part in [
            "-add-fd fd=3,set=2",
            "-chardev socket,id=m,fd=30,server=on",
            "-netdev tap,id=n,fds=3:4",
            "-netdev {\"type\":\"tap\",\"vhostfd\":\"25\"}",
            "-blockdev driver=file,filename=/dev/fdset/2",
            "-blockdev driver=raw,file.server.fd=3",
        ] {
            let error = target_argv(&argv(&format!("qemu {part}")), &[]).unwrap_err();
            assert_eq!(
                error,
                ArgvError::PassedDescriptor {
                    argument: part.to_owned()
                }
            );
        }
        let repaired = [replace("fd=30", "path=/run/q")];
        let source = argv("qemu -chardev socket,id=m,fd=30,server=on");
        assert!(target_argv(&source, &repaired).is_ok());
        assert!(target_argv(&argv("qemu -netdev {broken"), &[]).is_ok());
    }

    #[test]
    fn temporary_disk_writes_are_refused() {
        for part in ["-snapshot", "-drive file=a,snapshot=on"] {
            let error = target_argv(&argv(&format!("qemu {part}")), &[]).unwrap_err();
            assert_eq!(
                error,
                ArgvError::Snapshot {
                    argument: part.to_owned()
                }
            );
        }
        assert!(target_argv(&argv("qemu -drive file=a,snapshot=off"), &[]).is_ok());
    }

    #[test]
    fn the_machine_is_pinned_however_it_was_named() {
        let pinned = |line: &str| pin_machine(&argv(line), "pc-q35-7.2").join(" ");
        assert_eq!(
            pinned("qemu -machine q35,accel=tcg"),
            "qemu -machine pc-q35-7.2,accel=tcg"
        );
        assert_eq!(pinned("qemu -M q35 -m 1G"), "qemu -M pc-q35-7.2 -m 1G");
        assert_eq!(
            pinned("qemu -machine accel=tcg,type=q35"),
            "qemu -machine accel=tcg,type=pc-q35-7.2"
        );
        assert_eq!(
            pinned("qemu -machine accel=tcg,x=a,,b"),
            "qemu -machine accel=tcg,x=a,,b -machine pc-q35-7.2"
        );
        assert_eq!(pinned("qemu"), "qemu -machine pc-q35-7.2");
    }

    #[test]
    fn the_first_listening_qmp_socket_is_found() {
        let found = |line: &str| qmp_socket(&argv(line)).map(|p| p.display().to_string());
        let some = |path: &str| Some(path.to_owned());
        assert_eq!(
            found("q -qmp unix:/a,server=on,wait=off -qmp unix:/b,server"),
            some("/a")
        );
        assert_eq!(
            found("q -qmp unix:/client -qmp unix:/b,server,nowait"),
            some("/b")
        );
        assert_eq!(
            found("q -qmp tcp::4444,server -qmp unix:/b,server"),
            some("/b")
        );
        assert_eq!(
            found("q -chardev socket,id=c,path=/a,,b,server=on -mon chardev=c,mode=control"),
            some("/a,b")
        );
        assert_eq!(
            found("q -mon c,mode=control -chardev socket,path=/a,server,id=c"),
            some("/a")
        );
        assert_eq!(
            found("q -qmp chardev:c -chardev socket,id=c,path=/a,server"),
            some("/a")
        );
        assert_eq!(found("q -mon c -chardev socket,path=/a,server,id=c"), None);
        assert_eq!(
            found("q -chardev pty,id=c -mon chardev=c,mode=control"),
            None
        );
        assert_eq!(found("q -monitor unix:/hmp,server"), None);
        assert_eq!(found("q -qmp unix:,server"), None);
        assert_eq!(found(""), None);
    }

    proptest! {
        #[test]
        fn any_command_line_is_taken_without_panic(argv in proptest::collection::vec(
            prop_oneof![
                "[-,={}a-z:]{0,12}",
                Just("-S".to_owned()), Just("-incoming".to_owned()), Just("-machine".to_owned()),
                Just("-qmp".to_owned()), Just("-append".to_owned()), Just("unix:".to_owned()),
            ], 0..8))
        {
            let _ = qmp_socket(&argv);
            prop_assert!(pin_machine(&argv, "m").len() >= argv.len());
            if let Ok(target) = target_argv(&argv, &[]) {
                prop_assert!(target.len() <= argv.len());
                // Once is enough: the target of a target is the same.
                let again = target_argv(&target, &[]);
                prop_assert_eq!(again.as_ref(), Ok(&target));
            }
        }

        #[test]
        fn splitting_and_joining_settings_is_lossless(settings in proptest::collection::vec("[a=][a,=]{0,3}", 1..5)) {
            prop_assert_eq!(split_settings(&join_settings(&settings)), settings);
        }
    }
}

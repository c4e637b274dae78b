//! The command line, as data.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use agent::plan::PlanError;
use agent::types::{Compression, Mode, Plan, PrepareBounds, Preset, Scope, Sharing};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand};
use serde::de::DeserializeOwned;
use serde::de::value::StrDeserializer;

/// Move groups of running QEMU virtual machines between hosts.
#[derive(Debug, Parser)]
#[command(name = "gangway", version, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    /// Control socket of this host's agent [default: /run/gangway/control.sock].
    #[arg(long, global = true, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Where an agent with the usual configuration listens.
const SOCKET: &str = "/run/gangway/control.sock";

impl Cli {
    /// The agent's control socket.
    pub(crate) fn socket(&self) -> &Path {
        self.socket.as_deref().unwrap_or(Path::new(SOCKET))
    }

    /// What is wrong with options that are each right.
    pub(crate) fn conflict(&self) -> Option<clap::Error> {
        let listens = match &self.command {
            Command::Agent { .. } => {
                "an agent listens in the run directory that its configuration names"
            }
            Command::Index { .. } => "an index has no control socket",
            _ => return None,
        };
        let error =
            |_| Self::command().error(ErrorKind::ArgumentConflict, format!("--socket: {listens}"));
        self.socket.as_ref().map(error)
    }
}

const EXIT_CODES: &str = "\
Exit codes:
  0    all moved
  1    some VMs stayed, each runs at its source; doctor, prepare, survey:
       something is broken, or a host could not be looked at; cancel,
       continue, postcopy: refused for some VMs
  2    the command line, the plan or the configuration is wrong
  3    refused before anything was started
  4    a VM needs a person, or the agent cannot be asked any more
  130  left with Ctrl-C; the migration goes on";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the agent of this host.
    Agent {
        /// Configuration.
        #[arg(long, value_name = "FILE", default_value = "/etc/gangway/agent.toml")]
        config: PathBuf,
    },
    /// Run an index of page contents alone, for the plans that name it.
    ///
    /// Needed only where one agent's index is too small or too busy: without it, an agent of each
    /// group has the index. If it ends, moves go on and send more bytes.
    Index {
        /// Configuration.
        #[arg(long, value_name = "FILE", default_value = "/etc/gangway/index.toml")]
        config: PathBuf,
    },
    /// Migrate the VMs of a plan.
    ///
    /// The agent carries the migration out; it goes on if this command is ended, and
    /// `gangway status --watch` shows it again.
    Migrate(Migrate),
    /// Empty hosts: migrate every VM of theirs to others.
    ///
    /// Each VM, the largest first, goes to the host with the most memory left; its command line
    /// there is the same. `--plan` prints the plan instead, to be changed and given to `migrate`.
    Evacuate(Evacuate),
    /// Hash the memory of a plan's VMs, so that its migration knows what is duplicate.
    ///
    /// The results are kept for an hour. A migration of the same VMs between the same hosts takes
    /// them over; with scope `rack` it prepares by itself, and then looks only at what changed.
    Prepare(Prepare),
    /// Say what is duplicate in the memory of a plan's VMs, and what a migration would cost.
    ///
    /// Nothing is moved, and nothing is kept.
    Survey(Survey),
    /// Show what this host's agent is doing, or one group.
    Status {
        /// Group; all if absent.
        #[arg(value_parser = group_id)]
        group: Option<String>,
        /// Follow the group's migration to its end.
        #[arg(long)]
        watch: bool,
        /// One JSON object a line.
        #[arg(long)]
        json: bool,
    },
    /// End moves, with the VMs running at their sources.
    Cancel(Target),
    /// Let VMs go that are held before their start at the target (`confirm_handover`).
    Continue(Target),
    /// Have VMs that move in mode `hybrid` go over to post-copy now, whether they converge or not.
    ///
    /// Each then runs at its target before its memory is there, and needs both hosts until it is. The
    /// consent to that is the mode: moves of another mode are left as they are.
    Postcopy(Target),
    /// Finish or undo the moves of VMs that need a person.
    Recover(Target),
    /// Say whether this host is ready for migrations.
    Doctor {
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Print a shell's completions.
    Completions {
        /// Shell.
        shell: clap_complete::Shell,
    },
    /// Print the man page, or write those of all commands.
    Man {
        /// Directory for all pages.
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Migrate {
    /// The plan (TOML).
    plan: PathBuf,
    #[command(flatten)]
    overrides: Overrides,
    #[command(flatten)]
    pub(crate) manner: Manner,
}

impl Migrate {
    /// Reads the plan.
    pub(crate) fn plan(&self) -> Result<Plan, PlanError> {
        let plan = Plan::load(&self.plan)?;
        self.overrides.with(plan, &self.manner)
    }
}

/// How a migration is started and shown.
#[derive(Debug, Args)]
pub(crate) struct Manner {
    /// Print events and outcomes as one JSON object a line.
    #[arg(long)]
    pub(crate) json: bool,
    /// Do not hash memory before the migration.
    #[arg(long, conflicts_with = "seed_from_target")]
    no_prepare: bool,
    /// Also take contents from the VMs that run at the target hosts (scope `rack`); they count as of
    /// the trust domain `default`.
    #[arg(long)]
    seed_from_target: bool,
    /// Return once all agents have agreed; prints the group's id.
    #[arg(long)]
    pub(crate) detach: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Evacuate {
    /// Control APIs of the hosts to be emptied.
    #[arg(value_name = "HOST:PORT", required = true)]
    pub(crate) from: Vec<String>,
    /// Control APIs of the hosts that take the VMs.
    #[arg(long, value_name = "HOST:PORT", required = true, num_args = 1..)]
    pub(crate) to: Vec<String>,
    /// Print the plan (TOML) and start nothing.
    #[arg(long = "plan", conflicts_with = "json")]
    pub(crate) only_plan: bool,
    #[command(flatten)]
    pub(crate) overrides: Overrides,
    #[command(flatten)]
    pub(crate) manner: Manner,
}

#[derive(Debug, Args)]
pub(crate) struct Prepare {
    /// The plan (TOML).
    plan: PathBuf,
    #[command(flatten)]
    pub(crate) bounds: Bounds,
    /// Also hash the VMs that run at the target hosts; to be given to `migrate`, too.
    #[arg(long)]
    seed_from_target: bool,
    /// Print the result as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

impl Prepare {
    /// Reads the plan.
    pub(crate) fn plan(&self) -> Result<Plan, PlanError> {
        let mut plan = Plan::load(&self.plan)?;
        if self.seed_from_target {
            // Nothing else uses them.
            plan.scope = Some(Scope::Rack);
            plan.seed_from_target = true;
            plan.check()?;
        }
        Ok(plan)
    }
}

#[derive(Debug, Args)]
pub(crate) struct Survey {
    /// The plan (TOML).
    plan: PathBuf,
    /// Source hosts of the plan; all if absent.
    #[arg(value_name = "HOST")]
    pub(crate) hosts: Vec<String>,
    /// Forecast times at this budget of the whole group, in bytes per second; K, M and G are
    /// decimal. The plan's if absent.
    #[arg(long, value_name = "BYTES/S")]
    max_bandwidth: Option<Bytes>,
    #[command(flatten)]
    pub(crate) bounds: Bounds,
    /// Print the result as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
    /// Also write a page with plots.
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
}

impl Survey {
    /// Reads the plan.
    pub(crate) fn plan(&self) -> Result<Plan, PlanError> {
        let mut plan = Plan::load(&self.plan)?;
        let budget = self.max_bandwidth.map(|bytes| bytes.0);
        plan.max_bandwidth_bytes_per_s = budget.or(plan.max_bandwidth_bytes_per_s);
        plan.check()?;
        Ok(plan)
    }
}

/// What hashing may take on each host. It runs at idle priority besides.
#[derive(Debug, Args)]
pub(crate) struct Bounds {
    /// Percent of one processor that hashing may take on each host.
    #[arg(long, value_name = "PERCENT", default_value_t = PrepareBounds::default().cpu_percent,
          value_parser = clap::value_parser!(u8).range(1..=100))]
    cpu_percent: u8,
    /// Guest memory that is read in a second on each host; K, M and G are decimal.
    #[arg(long, value_name = "BYTES/S", default_value = "1G", value_parser = some_bytes)]
    read_rate: Bytes,
}

impl Bounds {
    /// As the API has them.
    pub(crate) fn get(&self) -> PrepareBounds {
        PrepareBounds {
            cpu_percent: self.cpu_percent,
            read_bytes_per_s: self.read_rate.0,
        }
    }
}

/// What the command line changes in the plan.
#[derive(Debug, Args)]
pub(crate) struct Overrides {
    /// Technique.
    #[arg(long, value_parser = choice::<Preset>(&["oc", "gang", "irlm", "slm", "full"]))]
    preset: Option<Preset>,
    /// Where duplicates are looked for.
    #[arg(long, value_parser = choice::<Scope>(&["none", "host", "rack"]))]
    scope: Option<Scope>,
    /// What becomes of page sharing at the target.
    #[arg(long, value_parser = choice::<Sharing>(&["off", "preserve", "identical"]))]
    sharing: Option<Sharing>,
    /// How page bytes are packed.
    #[arg(long, value_parser = choice::<Compression>(&["none", "zstd"]))]
    compression: Option<Compression>,
    /// When the VMs change hosts.
    #[arg(long, value_parser = choice::<Mode>(&["pre-copy", "post-copy", "hybrid"]))]
    mode: Option<Mode>,
    /// With mode `hybrid`: go over to post-copy once memory was copied for so long, whether the VM
    /// converges or not.
    #[arg(long, value_name = "SECONDS")]
    postcopy_after: Option<u64>,
    /// Budget of the whole group on the wire, in bytes per second; K, M and G are decimal.
    #[arg(long, value_name = "BYTES/S")]
    max_bandwidth: Option<Bytes>,
}

impl Overrides {
    /// The plan with all that was given, checked.
    pub(crate) fn with(&self, mut plan: Plan, manner: &Manner) -> Result<Plan, PlanError> {
        self.apply(&mut plan);
        if manner.no_prepare {
            plan.prepare = Some(false);
        }
        plan.seed_from_target |= manner.seed_from_target;
        plan.check()?;
        Ok(plan)
    }

    /// Puts what was given into the plan. A preset on the command line replaces the plan's
    /// preset, not the settings that the plan names one by one.
    fn apply(&self, plan: &mut Plan) {
        plan.preset = self.preset.or(plan.preset);
        plan.scope = self.scope.or(plan.scope);
        plan.sharing = self.sharing.or(plan.sharing);
        plan.compression = self.compression.or(plan.compression);
        plan.mode = self.mode.or(plan.mode);
        if self.mode.is_some_and(|mode| mode != Mode::Hybrid) {
            // The plan says it for its own mode, and another has no such time.
            plan.postcopy_after_s = None;
        }
        plan.postcopy_after_s = self.postcopy_after.or(plan.postcopy_after_s);
        let budget = self.max_bandwidth.map(|bytes| bytes.0);
        plan.max_bandwidth_bytes_per_s = budget.or(plan.max_bandwidth_bytes_per_s);
    }
}

/// Which moves an action is for.
#[derive(Debug, Args)]
pub(crate) struct Target {
    /// Group; may be left out if only one comes into question.
    #[arg(value_parser = group_id)]
    pub(crate) group: Option<String>,
    /// This VM only.
    #[arg(long, value_name = "VM")]
    pub(crate) vm: Option<String>,
    /// One JSON object a line.
    #[arg(long)]
    pub(crate) json: bool,
}

/// A number of bytes, written `250M`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bytes(u64);

impl FromStr for Bytes {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (number, unit) = match text.char_indices().last() {
            Some((at, 'k' | 'K')) => (&text[..at], 1_000),
            Some((at, 'm' | 'M')) => (&text[..at], 1_000_000),
            Some((at, 'g' | 'G')) => (&text[..at], 1_000_000_000),
            _ => (text, 1),
        };
        let bytes = number
            .parse::<u64>()
            .ok()
            .and_then(|number| number.checked_mul(unit));
        bytes
            .map(Self)
            .ok_or("a number of bytes, such as 250000000, 250000K or 250M")
    }
}

fn some_bytes(text: &str) -> Result<Bytes, &'static str> {
    let bytes: Bytes = text.parse()?;
    if bytes.0 == 0 {
        return Err("at 0 bytes per second it would never end");
    }
    Ok(bytes)
}

/// A group's id, which becomes part of the path of a request.
fn group_id(text: &str) -> Result<String, PlanError> {
    agent::plan::check_group_id(text).map(|()| text.to_owned())
}

/// Values of one of the API's enums, by the names that the API gives them.
fn choice<T>(names: &'static [&'static str]) -> impl TypedValueParser<Value = T>
where
    T: DeserializeOwned + Clone + Send + Sync + 'static,
{
    PossibleValuesParser::new(names).try_map(|name| {
        let name: StrDeserializer<'_, serde::de::value::Error> =
            serde::de::IntoDeserializer::into_deserializer(name.as_str());
        T::deserialize(name)
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn overrides(arguments: &str) -> Overrides {
        let line = format!("gangway migrate p {arguments}");
        match Cli::parse_from(line.split_whitespace()).command {
            Command::Migrate(migrate) => migrate.overrides,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_offered_value_is_one_of_the_apis() {
        let command = Cli::command();
        let migrate = command.find_subcommand("migrate").unwrap();
        let mut tried = 0;
        for argument in migrate
            .get_arguments()
            .filter(|argument| argument.get_long().is_some())
        {
            for value in argument.get_possible_values() {
                if matches!(
                    argument.get_long(),
                    Some("json" | "detach" | "no-prepare" | "seed-from-target")
                ) {
                    continue;
                }
                let long = argument.get_long().unwrap();
                overrides(&format!("--{long} {}", value.get_name()));
                tried += 1;
            }
        }
        assert_eq!(tried, 16);
    }

    #[test]
    fn the_command_line_overrides_the_plan_and_leaves_the_rest() {
        let text = "preset = \"oc\"\nscope = \"none\"\nmove = []\n[hosts]\n";
        let mut plan: Plan = toml::from_str(text).unwrap();
        overrides("--compression zstd --preset gang --max-bandwidth 20M").apply(&mut plan);
        assert_eq!(plan.preset, Some(Preset::Gang));
        assert_eq!(plan.compression, Some(Compression::Zstd));
        assert_eq!(plan.scope, Some(Scope::None));
        assert_eq!(plan.max_bandwidth_bytes_per_s, Some(20_000_000));
        assert_eq!(plan.postcopy_after_s, None);
        overrides("--mode hybrid --postcopy-after 30").apply(&mut plan);
        assert_eq!(plan.postcopy_after_s, Some(30));
        overrides("--mode hybrid").apply(&mut plan);
        assert_eq!(plan.postcopy_after_s, Some(30));
        overrides("--mode pre-copy").apply(&mut plan);
        assert_eq!(plan.postcopy_after_s, None, "the plan's goes with its mode");
        overrides("--mode pre-copy --postcopy-after 30").apply(&mut plan);
        assert_eq!(plan.postcopy_after_s, Some(30), "to be refused");
    }

    #[test]
    fn what_could_not_be_done_is_refused_as_usage() {
        for line in [
            "gangway prepare p --read-rate 0",
            "gangway evacuate a:1 --to b:1 --plan --json",
            "gangway status ../moves",
            "gangway cancel g/web",
            "gangway recover g?x",
        ] {
            let error = Cli::try_parse_from(line.split(' ')).err();
            assert_eq!(error.map(|error| error.exit_code()), Some(2), "{line}");
        }
        let line = "gangway evacuate a:1 --to b:1 --plan";
        Cli::try_parse_from(line.split(' ')).unwrap();
    }

    #[test]
    fn what_an_agent_tells_a_person_to_say_can_be_said() {
        // As the agent's tests expect it in the message.
        match Cli::parse_from("gangway recover g --vm v".split(' ')).command {
            Command::Recover(target) => {
                assert_eq!(target.group.as_deref(), Some("g"));
                assert_eq!(target.vm.as_deref(), Some("v"));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn bytes_are_numbers_with_decimal_units() {
        assert_eq!("64K".parse(), Ok(Bytes(64_000)));
        assert_eq!("7".parse(), Ok(Bytes(7)));
        for wrong in ["", "M", "1.5M", "-1", "99999999999999G", "1T"] {
            assert!(wrong.parse::<Bytes>().is_err(), "{wrong}");
        }
    }
}

//! Every key of config.toml: its type, and what we make of it.

use toml::{Table, Value};

use super::ConfigError;

/// What a value must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Type {
    Bool,
    Int,
    Text,
    /// A number or a text such as `10%`.
    Amount,
}

/// What we make of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    /// It is followed.
    Followed,
    /// It has no effect, and if it is set to anything the reader is told.
    Ignored(&'static str),
    /// Going on without it would not give what was asked for.
    Refused(&'static str),
}

use Type::{Amount, Bool, Int, Text};
use Use::{Followed, Ignored, Refused};

const LATER: &str = "it is not supported yet and has no effect";
const ROTATION: &str = "this log is not rotated by the program: use logrotate or log_to_stdout";
const NO_VM: &str = "mounts for virtual machines are not supported yet: set it to false";

const KEYS: &[(&str, Type, Use)] = &[
    ("version", Int, Followed),
    ("root", Text, Followed),
    ("address", Text, Followed),
    ("uid", Int, Followed),
    ("gid", Int, Followed),
    ("daemon_mode", Text, Followed),
    ("cleanup_on_close", Bool, Followed),
    ("system.enable", Bool, Followed),
    ("system.address", Text, Followed),
    ("system.uid", Int, Followed),
    ("system.gid", Int, Followed),
    ("system.debug.daemon_cpu_profile_duration_secs", Int, Ignored(LATER)),
    ("system.debug.pprof_address", Text, Ignored(LATER)),
    ("daemon.nydusd_config", Text, Followed),
    ("daemon.nydusd_path", Text, Followed),
    ("daemon.nydusimage_path", Text, Followed),
    ("daemon.fs_driver", Text, Followed),
    ("daemon.recover_policy", Text, Followed),
    ("daemon.threads_number", Int, Followed),
    ("daemon.log_rotation_size", Int, Followed),
    ("daemon.failover_policy", Text, Ignored(LATER)),
    ("cgroup.enable", Bool, Ignored("nydusd's memory is not limited here: use the unit's slice")),
    ("cgroup.memory_limit", Amount, Ignored("nydusd's memory is not limited here: use the unit's slice")),
    ("log.log_to_stdout", Bool, Followed),
    ("log.level", Text, Followed),
    ("log.dir", Text, Followed),
    ("log.log_rotation_max_size", Int, Ignored(ROTATION)),
    ("log.log_rotation_max_backups", Int, Ignored(ROTATION)),
    ("log.log_rotation_max_age", Int, Ignored(ROTATION)),
    ("log.log_rotation_local_time", Bool, Ignored(ROTATION)),
    ("log.log_rotation_compress", Bool, Ignored(ROTATION)),
    ("metrics.address", Text, Followed),
    ("metrics.hung_io_interval", Text, Ignored("numbers are read when they are asked for")),
    ("metrics.collect_interval", Text, Ignored("numbers are read when they are asked for")),
    ("remote.convert_vpc_registry", Bool, Ignored("the replaced program ignores it too")),
    ("remote.skip_ssl_verify", Bool, Followed),
    (
        "remote.mirrors_config.dir",
        Text,
        Ignored("mirrors are read from the template for nydusd: name them in its `mirrors`"),
    ),
    ("remote.auth.enable_kubeconfig_keychain", Bool, Ignored(LATER)),
    ("remote.auth.kubeconfig_path", Text, Ignored(LATER)),
    ("remote.auth.enable_cri_keychain", Bool, Followed),
    ("remote.auth.image_service_address", Text, Followed),
    ("remote.auth.enable_kubelet_credential_providers", Bool, Ignored(LATER)),
    ("remote.auth.credential_provider_config", Text, Ignored(LATER)),
    ("remote.auth.credential_provider_bin_dir", Text, Ignored(LATER)),
    (
        "remote.auth.credential_renewal_interval",
        Text,
        Ignored("credentials are looked for again when a registry refuses them"),
    ),
    ("snapshot.enable_nydus_overlayfs", Bool, Refused(NO_VM)),
    ("snapshot.nydus_overlayfs_path", Text, Ignored(LATER)),
    ("snapshot.enable_kata_volume", Bool, Refused(NO_VM)),
    ("snapshot.sync_remove", Bool, Ignored("directories are always removed at once")),
    ("snapshot.enable_overlayfs_volatile", Bool, Followed),
    ("cache_manager.disable", Bool, Ignored("the replaced program ignores it too")),
    ("cache_manager.gc_period", Text, Ignored("the replaced program ignores it too")),
    ("cache_manager.cache_dir", Text, Followed),
    ("image.public_key_file", Text, Ignored(LATER)),
    ("image.validate_signature", Bool, Refused("signatures of bootstraps are not checked yet: set it to false")),
    ("experimental.enable_stargz", Bool, Followed),
    ("experimental.enable_referrer_detect", Bool, Ignored(LATER)),
    ("experimental.enable_index_detect", Bool, Ignored(LATER)),
    (
        "experimental.enable_backend_source",
        Bool,
        Ignored(
            "nydusd always asks for the current credential when the one in its file, which only root can read, is refused",
        ),
    ),
    ("experimental.tarfs.enable_tarfs", Bool, Refused("tarfs is not supported yet: set it to false")),
    ("experimental.tarfs.mount_tarfs_on_host", Bool, Ignored(LATER)),
    ("experimental.tarfs.tarfs_hint", Bool, Ignored(LATER)),
    ("experimental.tarfs.max_concurrent_proc", Int, Ignored(LATER)),
    ("experimental.tarfs.export_mode", Text, Ignored(LATER)),
];

/// The keys of a file whose types are right.
#[derive(Debug, Default)]
pub(super) struct Keys(Table);

impl Keys {
    /// Checks every key of `table`; returns it with one warning for each key that has no effect.
    pub(super) fn check(table: Table) -> Result<(Self, Vec<String>), ConfigError> {
        let mut warnings = Vec::new();
        walk("", &table, &mut warnings)?;
        Ok((Self(table), warnings))
    }

    pub(super) fn text(&self, path: &str) -> Option<&str> {
        // As in the replaced program, an empty text is one that was not given.
        self.value(path)?.as_str().filter(|text| !text.is_empty())
    }

    pub(super) fn flag(&self, path: &str) -> Option<bool> {
        self.value(path)?.as_bool()
    }

    pub(super) fn number(&self, path: &str) -> Option<i64> {
        self.value(path)?.as_integer()
    }

    fn value(&self, path: &str) -> Option<&Value> {
        debug_assert!(
            KEYS.iter().any(|(known, _, used)| *known == path && *used == Followed),
            "{path} is not listed as followed"
        );
        let mut keys = path.split('.');
        let mut value = self.0.get(keys.next()?)?;
        for key in keys {
            value = value.get(key)?;
        }
        Some(value)
    }
}

fn walk(prefix: &str, table: &Table, warnings: &mut Vec<String>) -> Result<(), ConfigError> {
    for (key, value) in table {
        let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        if let Some((_, wanted, used)) = KEYS.iter().find(|(known, ..)| *known == path) {
            if !fits(*wanted, value) {
                return Err(ConfigError::Type { key: path, wanted: wanted.name(), got: value.type_str() });
            }
            match used {
                Ignored(why) if says_something(value) => warnings.push(format!("key {path} is ignored: {why}")),
                Refused(why) if says_something(value) => {
                    return Err(ConfigError::Value { key: path, why: (*why).to_owned() });
                }
                _ => {}
            }
        } else if KEYS.iter().any(|(known, ..)| known.starts_with(&format!("{path}."))) {
            match value {
                Value::Table(inner) => walk(&path, inner, warnings)?,
                _ => return Err(ConfigError::Type { key: path, wanted: "a table", got: value.type_str() }),
            }
        } else {
            warnings.push(format!("key {path} is unknown and ignored: is it misspelt?"));
        }
    }
    Ok(())
}

impl Type {
    fn name(self) -> &'static str {
        match self {
            Bool => "true or false",
            Int => "a number",
            Text => "a text in quotes",
            Amount => "a number or a text in quotes",
        }
    }
}

fn fits(wanted: Type, value: &Value) -> bool {
    match wanted {
        Bool => value.is_bool(),
        Int => value.is_integer(),
        Text => value.is_str(),
        Amount => value.is_integer() || value.is_str(),
    }
}

/// Whether a value is more than the empty, false or zero that sample files are full of.
fn says_something(value: &Value) -> bool {
    match value {
        Value::Boolean(flag) => *flag,
        Value::Integer(number) => *number != 0,
        Value::String(text) => !text.is_empty(),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with one key.
    fn file(key: &str, value: Value) -> Table {
        let mut parts = key.rsplit('.');
        let mut table = Table::new();
        table.insert(parts.next().expect("a key").to_owned(), value);
        for part in parts {
            table = Table::from_iter([(part.to_owned(), Value::Table(table))]);
        }
        table
    }

    #[test]
    fn every_key_refuses_every_other_type_by_name() {
        let values = [
            Value::Boolean(true),
            Value::Integer(7),
            Value::Float(1.5),
            Value::String("text".to_owned()),
            Value::Array(vec![Value::Integer(1)]),
            Value::Table(Table::from_iter([("x".to_owned(), Value::Integer(1))])),
            Value::Datetime("2026-01-02".parse().expect("a date")),
        ];
        for (key, wanted, _) in KEYS {
            for value in values.iter().filter(|value| !fits(*wanted, value)) {
                let error = Keys::check(file(key, value.clone())).expect_err(key).to_string();
                assert!(error.contains(key) && error.contains(wanted.name()), "{key} = {value}: {error}");
            }
        }
    }

    #[test]
    fn every_table_refuses_to_be_a_value() {
        for (key, ..) in KEYS {
            let Some((table, _)) = key.rsplit_once('.') else { continue };
            let error = Keys::check(file(table, Value::Integer(1))).expect_err(table).to_string();
            assert!(error.contains(table) && error.contains("a table"), "{table}: {error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(text in "[a-z_.\\[\\]=\"0-9\n ]{0,80}") {
            if let Ok(table) = text.parse::<Table>() {
                let _ = Keys::check(table);
            }
        }
    }
}

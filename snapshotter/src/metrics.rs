//! Numbers for Prometheus, under the names that the replaced program uses where the meaning is the same.

use std::fmt::Write as _;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::cache::Cache;
use crate::daemons::Report;

/// Upper bounds of the buckets, in milliseconds.
const BOUNDS: [u64; 10] = [1, 5, 10, 50, 100, 500, 1_000, 5_000, 10_000, 20_000];

/// A call whose duration is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Prepare and View.
    Prepare,
    /// Mounts.
    Mounts,
    /// Remove.
    Remove,
    /// Cleanup.
    Cleanup,
}

const OPERATIONS: [(Operation, &str); 4] = [
    (Operation::Prepare, "PREPARE"),
    (Operation::Mounts, "MOUNTS"),
    (Operation::Remove, "REMOVE"),
    (Operation::Cleanup, "CLEANUP"),
];

#[derive(Debug, Default, Clone, Copy)]
struct Histogram {
    buckets: [u64; BOUNDS.len()],
    count: u64,
    sum: f64,
}

/// What is counted while we run.
#[derive(Debug)]
pub struct Metrics {
    begun: Instant,
    durations: Mutex<[Histogram; OPERATIONS.len()]>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self { begun: Instant::now(), durations: Mutex::default() }
    }
}

impl Metrics {
    /// Counts a call.
    pub fn took(&self, operation: Operation, duration: Duration) {
        let mut durations = self.durations.lock().expect("no code panics while it holds this lock");
        let index = OPERATIONS.iter().position(|(known, _)| *known == operation).expect("every operation is listed");
        let histogram = &mut durations[index];
        let millis = duration.as_secs_f64() * 1_000.0;
        for (bucket, bound) in histogram.buckets.iter_mut().zip(BOUNDS) {
            if millis <= bound as f64 {
                *bucket += 1;
            }
        }
        histogram.count += 1;
        histogram.sum += millis;
    }

    /// The text that Prometheus reads.
    pub fn text(&self, daemons: &[Report], cache: &Cache, process: Usage) -> String {
        let mut text = String::new();
        let durations = *self.durations.lock().expect("no code panics while it holds this lock");
        let name = "snapshotter_snapshot_operation_elapsed_milliseconds";
        head(&mut text, name, "histogram", "Duration of calls of containerd, in milliseconds.");
        for ((_, operation), histogram) in OPERATIONS.iter().zip(durations) {
            for (bucket, bound) in histogram.buckets.iter().zip(BOUNDS) {
                line(
                    &mut text,
                    &format!("{name}_bucket{{snapshot_operation=\"{operation}\",le=\"{bound}\"}}"),
                    *bucket as f64,
                );
            }
            let labels = format!("{{snapshot_operation=\"{operation}\",le=\"+Inf\"}}");
            line(&mut text, &format!("{name}_bucket{labels}"), histogram.count as f64);
            line(&mut text, &format!("{name}_sum{{snapshot_operation=\"{operation}\"}}"), histogram.sum);
            line(&mut text, &format!("{name}_count{{snapshot_operation=\"{operation}\"}}"), histogram.count as f64);
        }
        let running = daemons.iter().filter(|daemon| daemon.pid.is_some()).count();
        let images: usize = daemons.iter().map(|daemon| daemon.images.len()).sum();
        let (deleted, failed) = cache.counts();
        let single = [
            ("nydusd_counts", "gauge", "Running nydusd processes.", running as f64),
            ("nydusd_images", "gauge", "Images that they mount.", images as f64),
            (
                "snapshotter_cache_usage_kilobytes",
                "gauge",
                "Space that cached blobs take.",
                (cache.total() / 1024) as f64,
            ),
            ("snapshotter_cache_blobs_deleted_total", "counter", "Cache files deleted.", deleted as f64),
            (
                "snapshotter_cache_blob_deletion_errors_total",
                "counter",
                "Cache files that could not be deleted.",
                failed as f64,
            ),
            ("snapshotter_run_time_seconds", "gauge", "Time since the start.", self.begun.elapsed().as_secs_f64()),
            ("snapshotter_memory_usage_kilobytes", "gauge", "Resident memory.", process.memory_kb as f64),
            ("snapshotter_thread_counts", "gauge", "Threads.", process.threads as f64),
            ("snapshotter_fd_counts", "gauge", "Open descriptors.", process.descriptors as f64),
        ];
        for (name, kind, help, value) in single {
            head(&mut text, name, kind, help);
            line(&mut text, name, value);
        }
        head(&mut text, "nydusd_rss_kilobytes", "gauge", "Resident memory of each nydusd.");
        for daemon in daemons {
            if let Some(pid) = daemon.pid {
                let memory = Usage::of(&pid.to_string()).memory_kb as f64;
                line(&mut text, &format!("nydusd_rss_kilobytes{{daemon_id=\"{}\"}}", daemon.name), memory);
            }
        }
        text
    }
}

/// What a process takes.
#[derive(Debug, Default, Clone, Copy)]
pub struct Usage {
    /// Resident memory, KiB.
    pub memory_kb: u64,
    /// Threads.
    pub threads: u64,
    /// Open descriptors.
    pub descriptors: u64,
}

impl Usage {
    /// Reads `/proc` about a process, by number or `self`; what cannot be read is 0.
    pub fn of(process: &str) -> Self {
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
        let field = |name: &str| {
            let rest = status.lines().find_map(|line| line.strip_prefix(name))?;
            rest.split_ascii_whitespace().next()?.parse().ok()
        };
        let descriptors = std::fs::read_dir(format!("/proc/{process}/fd")).map_or(0, |entries| entries.count() as u64);
        Self { memory_kb: field("VmRSS:").unwrap_or(0), threads: field("Threads:").unwrap_or(0), descriptors }
    }
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    let written = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    debug_assert!(written.is_ok(), "writing to a string cannot fail");
}

fn line(text: &mut String, name: &str, value: f64) {
    let written = writeln!(text, "{name} {value}");
    debug_assert!(written.is_ok(), "writing to a string cannot fail");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_a_name_and_a_number_and_buckets_add_up() {
        let metrics = Metrics::default();
        metrics.took(Operation::Mounts, Duration::from_millis(7));
        metrics.took(Operation::Mounts, Duration::from_secs(60));
        let text = metrics.text(&[], &Cache::new("/nonexistent".into(), true), Usage::of("self"));
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').expect("two words");
            assert!(!name.is_empty());
            value.parse::<f64>().expect("a number");
        }
        let bucket = |le: &str| {
            let name = format!("_bucket{{snapshot_operation=\"MOUNTS\",le=\"{le}\"}} ");
            text.lines().find_map(|line| line.split_once(&name).map(|(_, value)| value.to_owned())).expect("there")
        };
        assert_eq!(
            (bucket("5").as_str(), bucket("10").as_str(), bucket("20000").as_str(), bucket("+Inf").as_str()),
            ("0", "1", "1", "2")
        );
    }
}

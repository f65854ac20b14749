//! Threads that name and compress chunks, for all layers of all images.
//!
//! There is no bound on the queue: each [`super::Packer`] bounds what it has under way.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::PackError;

type Work = Box<dyn FnOnce() + Send>;

/// Something to be done by a worker.
pub(super) struct Job {
    /// What is served first, if several wait.
    pub(super) weight: u64,
    pub(super) work: Work,
}

/// The threads.
#[derive(Debug)]
pub struct Pool {
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

/// Jobs by weight, the heaviest first, and then by the order in which they came.
#[derive(Default)]
struct Waiting {
    jobs: BTreeMap<(Reverse<u64>, u64), Work>,
    came: u64,
    closed: bool,
}

impl std::fmt::Debug for Waiting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Waiting").field("jobs", &self.jobs.len()).field("closed", &self.closed).finish()
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a job; `None` once nothing can come any more.
    fn next(&self) -> Option<Work> {
        let mut waiting = self.lock();
        loop {
            if let Some((_, work)) = waiting.jobs.pop_first() {
                return Some(work);
            }
            if waiting.closed {
                return None;
            }
            waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Held by a thread while it works. One that panics takes all jobs with it, so that nobody waits for them.
struct Alive<'q>(&'q Queue);

impl Drop for Alive<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let mut waiting = self.0.lock();
            waiting.closed = true;
            let lost = std::mem::take(&mut waiting.jobs);
            drop(waiting);
            drop(lost);
            self.0.changed.notify_all();
        }
    }
}

impl Pool {
    /// Starts this many threads.
    ///
    /// # Errors
    ///
    /// If the system refuses a thread.
    pub fn start(threads: usize) -> io::Result<Self> {
        let mut pool = Self { queue: Arc::default(), threads: Vec::new() };
        for number in 0..threads {
            let queue = Arc::clone(&pool.queue);
            let work = move || {
                let alive = Alive(&queue);
                while let Some(work) = queue.next() {
                    work();
                }
                drop(alive);
            };
            pool.threads.push(std::thread::Builder::new().name(format!("pack-{number}")).spawn(work)?);
        }
        Ok(pool)
    }

    /// Starts as many threads as there are processors to use.
    ///
    /// # Errors
    ///
    /// If the system refuses a thread.
    pub fn for_this_machine() -> io::Result<Self> {
        Self::start(std::thread::available_parallelism().map_or(1, usize::from))
    }

    /// Returns how many threads there are.
    pub fn threads(&self) -> usize {
        self.threads.len()
    }

    pub(super) fn hand_out(&self, job: Job) -> Result<(), PackError> {
        let mut waiting = self.queue.lock();
        if waiting.closed {
            return Err(PackError::Stopped);
        }
        let place = (Reverse(job.weight), waiting.came);
        waiting.came += 1;
        waiting.jobs.insert(place, job.work);
        drop(waiting);
        self.queue.changed.notify_one();
        Ok(())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.queue.lock().closed = true;
        self.queue.changed.notify_all();
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_job_that_panics_is_an_error_for_all_that_wait() {
        let pool = Pool::start(1).unwrap();
        let (sender, answers) = channel::<()>();
        let other = sender.clone();
        let fall = move || {
            let _held = sender;
            panic!("as a test wants it");
        };
        pool.hand_out(Job { weight: 1, work: Box::new(fall) }).unwrap();
        // It may have happened already.
        drop(pool.hand_out(Job { weight: 0, work: Box::new(move || other.send(()).unwrap()) }));
        assert!(answers.recv().is_err(), "the second was served by nobody");
        assert!(pool.hand_out(Job { weight: 0, work: Box::new(|| {}) }).is_err());
    }

    #[test]
    fn what_weighs_most_is_served_first_and_equals_in_the_order_in_which_they_came() {
        let pool = Pool::start(1).unwrap();
        let (started, has_started) = channel();
        let (go, gone) = channel::<()>();
        let hold = move || {
            started.send(()).unwrap();
            let _held = gone.recv();
        };
        pool.hand_out(Job { weight: 0, work: Box::new(hold) }).unwrap();
        has_started.recv().unwrap();
        let (sender, served) = channel();
        for (name, weight) in [("light", 1), ("first", 7), ("second", 7), ("heavy", 9)] {
            let sender = sender.clone();
            let work = move || sender.send(name).unwrap();
            pool.hand_out(Job { weight, work: Box::new(work) }).unwrap();
        }
        drop((go, sender));
        assert_eq!(served.iter().collect::<Vec<_>>(), ["heavy", "first", "second", "light"]);
    }
}

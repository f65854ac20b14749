//! A process that is known by more than its number.
//!
//! Numbers are used again. A number with the moment of its start is not, so a daemon that we adopt, and whose parent we are
//! not, can be watched without ever mistaking a stranger for it.

use std::fs;

/// A process of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    pid: i32,
    /// Clock ticks after boot.
    started: u64,
}

impl Process {
    /// The process with this number, if there is one that has not ended.
    pub fn find(pid: i32) -> Option<Self> {
        let (state, started) = look(pid)?;
        (!ended(state)).then_some(Self { pid, started })
    }

    /// Its number.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it still runs. A process that nobody has waited for has ended.
    pub fn alive(&self) -> bool {
        look(self.pid).is_some_and(|(state, started)| started == self.started && !ended(state))
    }
}

fn ended(state: char) -> bool {
    matches!(state, 'Z' | 'X' | 'x')
}

/// State and start of a process.
fn look(pid: i32) -> Option<(char, u64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name is in parentheses and may hold anything; the rest follows the last one.
    let mut fields = stat[stat.rfind(')')? + 1..].split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let started = fields.nth(18)?.parse().ok()?;
    Some((state, started))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_alive_until_it_ends_even_if_nobody_waits_for_it() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep is on every machine");
        let pid = i32::try_from(child.id()).expect("process numbers are small");
        let process = Process::find(pid).expect("just started");
        assert!(process.alive());
        child.kill().expect("it is ours");
        while process.alive() {
            std::thread::yield_now();
        }
        // Still a zombie: it was not waited for.
        assert_eq!(Process::find(pid), None);
        child.wait().expect("it is ours");
    }

    #[test]
    fn a_number_used_again_is_another_process() {
        let me = Process::find(i32::try_from(std::process::id()).expect("small")).expect("we run");
        assert!(me.alive());
        assert!(!Process { started: me.started + 1, ..me }.alive());
    }
}

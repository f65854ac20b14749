//! Programs that read a file, in processes of their own, since they may have to be killed.

use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A way to wait for a page of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    /// `read()`, and what the kernel reads ahead of it.
    Read,
    /// A page fault.
    Map,
    /// The kernel reads the file to execute it.
    Exec,
    /// `read()` past the kernel's memory.
    Direct,
    /// From file to pipe inside the kernel.
    Splice,
}

impl How {
    pub(crate) const ALL: [Self; 5] = [Self::Read, Self::Map, Self::Exec, Self::Direct, Self::Splice];

    /// Starts a program that reads `path` so.
    pub(crate) fn read(self, path: &Path) -> Child {
        let python = |script: &str| {
            let mut command = Command::new("python3");
            command.args(["-c", script]);
            command
        };
        let mut command = match self {
            Self::Read => Command::new("cat"),
            Self::Map => python(
                "import mmap, sys\n\
                 file = open(sys.argv[1], 'rb')\n\
                 pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\n\
                 sum(pages[at] for at in range(0, len(pages), 4096))",
            ),
            Self::Exec => {
                let mut command = Command::new("sh");
                command.args(["-c", "exec \"$0\""]);
                command
            }
            Self::Direct => python(
                "import mmap, os, sys\n\
                 file = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)\n\
                 room = mmap.mmap(-1, 1 << 20)\n\
                 while os.readv(file, [room]): pass",
            ),
            Self::Splice => python(
                "import os, sys\n\
                 file, (out, into) = os.open(sys.argv[1], os.O_RDONLY), os.pipe()\n\
                 while os.splice(file, into, 65536): os.read(out, 65536)",
            ),
        };
        command.arg(path).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }
}

/// Starts a program that reads a file.
pub(crate) fn reader(path: &Path) -> Child {
    How::Read.read(path)
}

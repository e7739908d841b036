//! File systems of one's own: images, mounts, and what can be done to them from outside.
//!
//! Upstairs:   `power`, and tests of full, read-only and failing devices; root only, and only
//!             where mounts are private (`unshare --mount`).
//! Downstairs: `mount`, `umount`, `mkfs.ext4`, `chattr`, `perl`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// `EXT4_IOC_SHUTDOWN` with `NOLOGFLUSH`: no unsafe code here makes the call.
const SHUTDOWN: &str = "my $flags = pack('L', 2); open(F, '<', $ARGV[0]) or die $!; \
                        ioctl(F, 0x8004587d, $flags) or die \"shutdown: $!\";";
/// Name of the image beside the mount.
const IMAGE: &str = "image";

/// Runs a command; its complaint when it fails.
pub fn command(program: &str, args: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(args).output();
    let output = output.map_err(|problem| format!("{program}: {problem}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!(
            "{program}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )),
    }
}

/// Makes this process's mounts private and mounts `args` on a new folder.
pub fn mount(args: &[&str], at: &Path) -> Result<(), String> {
    std::fs::create_dir_all(at).map_err(|problem| problem.to_string())?;
    command("mount", &["--make-rprivate", "/"])?;
    let at = at.display().to_string();
    command("mount", &[args, &[at.as_str()]].concat())
}

/// An ext4 file system in a file beside the mounts. Unit of `size`: MiB.
fn image(scratch: &Path, size: u64) -> Result<PathBuf, String> {
    let image = scratch.join(IMAGE);
    let file = std::fs::File::create(&image).map_err(|problem| problem.to_string())?;
    file.set_len(size << 20)
        .map_err(|problem| problem.to_string())?;
    command("mkfs.ext4", &["-q", "-F", &image.display().to_string()])?;
    Ok(image)
}

/// The mount's arguments for a new image, or ones that fail with the reason. Unit of `size`: MiB.
pub fn loop_args(scratch: &Path, size: u64) -> Vec<String> {
    match image(scratch, size) {
        Ok(image) => vec!["-o".into(), "loop".into(), image.display().to_string()],
        Err(why) => vec![why],
    }
}

/// The image that is mounted on `at`.
pub fn image_of(at: &Path) -> PathBuf {
    at.with_file_name(IMAGE)
}

/// Stops the file system in the middle: its journal is not flushed, nothing more is written.
pub fn shut_down(at: &Path) -> Result<(), String> {
    command("perl", &["-e", SHUTDOWN, &at.display().to_string()])
}

/// Unmounts, as soon as the kernel has let the files of a process go, and mounts the image again.
pub fn remount(at: &Path) -> Result<(), String> {
    let begin = Instant::now();
    while let Err(why) = command("umount", &[&at.display().to_string()]) {
        if begin.elapsed() > Duration::from_secs(20) {
            return Err(why);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    mount(&["-o", "loop", &image_of(at).display().to_string()], at)
}

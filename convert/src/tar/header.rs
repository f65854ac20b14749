//! One header block of a tar and its fields.
//!
//! Numbers are octal text, or binary with the top bit of the first byte set where octal would not fit.

use super::BLOCK;

/// A block of 512 bytes that is or may be a header.
pub(crate) struct Block([u8; BLOCK]);

impl Block {
    pub(crate) fn zeroed() -> Self {
        Self([0; BLOCK])
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8; BLOCK] {
        &mut self.0
    }

    pub(super) fn is_zero(&self) -> bool {
        self.0.iter().all(|&byte| byte == 0)
    }

    /// Checks the checksum; some old writers summed signed bytes.
    pub(super) fn check(&self) -> Result<(), String> {
        let wanted = octal(&self.0[148..156]).ok_or("its checksum is not a number")?;
        let with_blanks = |at: usize, byte: u8| if (148..156).contains(&at) { b' ' } else { byte };
        let mut unsigned = 0_i64;
        let mut signed = 0_i64;
        for (at, &byte) in self.0.iter().enumerate() {
            let byte = with_blanks(at, byte);
            unsigned += i64::from(byte);
            signed += i64::from(byte.cast_signed());
        }
        if wanted == unsigned || wanted == signed {
            Ok(())
        } else {
            Err(format!("its checksum is {wanted} and {unsigned} was wanted"))
        }
    }

    pub(super) fn type_flag(&self) -> u8 {
        self.0[156]
    }

    fn is_ustar(&self) -> bool {
        &self.0[257..263] == b"ustar\0"
    }

    fn is_gnu(&self) -> bool {
        &self.0[257..265] == b"ustar  \0"
    }

    pub(super) fn path(&self) -> Vec<u8> {
        let name = text(&self.0[0..100]);
        // The prefix is 131 bytes in star's variant of the format, which ends in `tar`.
        let prefix = match (self.is_ustar(), &self.0[508..512] == b"tar\0") {
            (true, false) => text(&self.0[345..500]),
            (true, true) => text(&self.0[345..476]),
            (false, _) => &[],
        };
        if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
    }

    pub(super) fn link(&self) -> Vec<u8> {
        text(&self.0[157..257]).to_vec()
    }

    pub(super) fn mode(&self) -> Result<u16, String> {
        let mode = number(&self.0[100..108]).ok_or("its mode is not a number")?;
        Ok(u16::try_from(mode & 0o7777).expect("twelve bits"))
    }

    pub(super) fn uid(&self) -> Result<i64, String> {
        number(&self.0[108..116]).ok_or_else(|| "its owner is not a number".to_owned())
    }

    pub(super) fn gid(&self) -> Result<i64, String> {
        number(&self.0[116..124]).ok_or_else(|| "its group is not a number".to_owned())
    }

    pub(super) fn size(&self) -> Result<u64, String> {
        let size = number(&self.0[124..136]).ok_or("its size is not a number")?;
        u64::try_from(size).map_err(|_| format!("its size is {size}"))
    }

    pub(super) fn mtime(&self) -> Result<i64, String> {
        number(&self.0[136..148]).ok_or_else(|| "its time is not a number".to_owned())
    }

    /// Returns the device numbers; blank fields, and those of formats without them, are 0.
    pub(super) fn device(&self) -> Result<(u32, u32), String> {
        if !self.is_ustar() && !self.is_gnu() {
            return Ok((0, 0));
        }
        let one = |field: &[u8]| {
            let value = number(field).ok_or("its device number is not a number")?;
            u32::try_from(value).map_err(|_| format!("its device number is {value}"))
        };
        Ok((one(&self.0[329..337])?, one(&self.0[337..345])?))
    }

    pub(super) fn sparse_real_size(&self) -> Result<u64, String> {
        let size = number(&self.0[483..495]).ok_or("its real size is not a number")?;
        u64::try_from(size).map_err(|_| format!("its real size is {size}"))
    }

    pub(super) fn sparse_pieces(&self) -> &[u8] {
        &self.0[386..482]
    }

    pub(super) fn sparse_continues(&self) -> bool {
        self.0[482] != 0
    }

    pub(super) fn continued_pieces(&self) -> &[u8] {
        &self.0[0..504]
    }

    pub(super) fn continued_continues(&self) -> bool {
        self.0[504] != 0
    }
}

fn text(field: &[u8]) -> &[u8] {
    let end = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    &field[..end]
}

/// Reads a numeric field: octal, or base 256 (two's complement, big endian) if its top bit is set.
pub(super) fn number(field: &[u8]) -> Option<i64> {
    let first = *field.first()?;
    if first & 0x80 == 0 {
        return octal(field);
    }
    let negative = first & 0x40 != 0;
    let mut value: i128 = i128::from(first & 0x3f) - if negative { 0x40 } else { 0 };
    for &byte in &field[1..] {
        value = value.checked_mul(256)?.checked_add(i128::from(byte))?;
    }
    i64::try_from(value).ok()
}

fn octal(field: &[u8]) -> Option<i64> {
    let field = field.trim_ascii_start();
    let end = field.iter().position(|&byte| byte == 0 || byte == b' ').unwrap_or(field.len());
    // Some writers pad with NUL in front.
    let digits = if end == 0 {
        field.iter().position(|&byte| byte != 0 && byte != b' ').map_or(&field[..0], |from| text_end(&field[from..]))
    } else {
        &field[..end]
    };
    let mut value = 0_i64;
    for &digit in digits {
        if !(b'0'..=b'7').contains(&digit) {
            return None;
        }
        value = value.checked_mul(8)?.checked_add(i64::from(digit - b'0'))?;
    }
    Some(value)
}

fn text_end(field: &[u8]) -> &[u8] {
    let end = field.iter().position(|&byte| byte == 0 || byte == b' ').unwrap_or(field.len());
    &field[..end]
}

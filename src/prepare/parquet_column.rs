//! A column of text in a Parquet file, row by row.

use std::fs::File;

use parquet::basic::Type;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};

use crate::failure::guarded;

/// Rows that are read at a time.
const ROWS: usize = 32;

/// The rows of a column; missing ones are none.
pub struct Column {
    file: SerializedFileReader<File>,
    /// Rows of the file.
    pub count: u64,
    column: usize,
    optional: bool,
    /// The next group of rows, and what is left of the one before.
    group: usize,
    reader: Option<ColumnReaderImpl<ByteArrayType>>,
    rows: std::vec::IntoIter<Option<ByteArray>>,
}

impl Column {
    /// The column `field` of a file, from row `row` on.
    ///
    /// # Errors
    /// What the file lacks.
    pub fn open(file: File, field: &str, row: u64) -> Result<Column, String> {
        guarded(|| Column::opened(file, field, row))
    }

    fn opened(file: File, field: &str, row: u64) -> Result<Column, String> {
        let file = SerializedFileReader::new(file).map_err(|error| no_parquet(&error))?;
        let schema = file.metadata().file_metadata().schema_descr_ptr();
        let names = || {
            let names: Vec<String> = schema
                .columns()
                .iter()
                .map(|column| format!("`{}`", column.path().string()))
                .collect();
            names.join(", ")
        };

        let column = schema.columns().iter().position(|column| column.path().string() == field);
        let column = column.ok_or_else(|| format!("no column `{field}`; it has {}", names()))?;
        let found = schema.column(column);
        if found.physical_type() != Type::BYTE_ARRAY
            || found.max_rep_level() > 0
            || found.max_def_level() > 1
        {
            return Err(format!("its column `{field}` is no text, but {}", found.physical_type()));
        }

        let optional = found.max_def_level() == 1;
        let count = file.metadata().file_metadata().num_rows().max(0) as u64;
        let rows = Vec::new().into_iter();
        let mut opened = Column { file, count, column, optional, group: 0, reader: None, rows };
        opened.skip(row)?;
        Ok(opened)
    }

    /// Whole groups of rows, then rows of one.
    fn skip(&mut self, mut row: u64) -> Result<(), String> {
        while self.group < self.file.num_row_groups() {
            let rows = self.file.metadata().row_group(self.group).num_rows().max(0) as u64;
            if row < rows {
                break;
            }
            row -= rows;
            self.group += 1;
        }

        for _ in 0..row {
            self.next_row()?;
        }
        Ok(())
    }

    /// The next row, if there is one.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn next_row(&mut self) -> Result<Option<Option<ByteArray>>, String> {
        match self.rows.next() {
            Some(row) => Ok(Some(row)),
            None => guarded(|| self.read_on()),
        }
    }

    /// The first of the next rows.
    fn read_on(&mut self) -> Result<Option<Option<ByteArray>>, String> {
        loop {
            if let Some(row) = self.rows.next() {
                return Ok(Some(row));
            }

            let Some(reader) = &mut self.reader else {
                if self.group >= self.file.num_row_groups() {
                    return Ok(None);
                }

                let group =
                    self.file.get_row_group(self.group).map_err(|error| no_parquet(&error))?;
                let reader =
                    group.get_column_reader(self.column).map_err(|error| no_parquet(&error))?;
                let ColumnReader::ByteArrayColumnReader(reader) = reader else {
                    return Err("its column is no text".into());
                };
                self.group += 1;
                self.reader = Some(reader);
                continue;
            };

            let (mut values, mut levels) = (Vec::new(), Vec::new());
            let (read, ..) = reader
                .read_records(ROWS, self.optional.then_some(&mut levels), None, &mut values)
                .map_err(|error| no_parquet(&error))?;
            if read == 0 {
                self.reader = None;
                continue;
            }

            let rows: Vec<Option<ByteArray>> = match self.optional {
                false => values.into_iter().map(Some).collect(),
                true => {
                    let mut values = values.into_iter();
                    levels
                        .iter()
                        .map(|level| if *level > 0 { values.next() } else { None })
                        .collect()
                }
            };
            self.rows = rows.into_iter();
        }
    }
}

fn no_parquet(error: &ParquetError) -> String {
    format!("not Parquet as it can be read here ({error})")
}

// The numbers by which a kernel is chosen or its work is cut, with what measured them where one did. docs/log/cpu.md
// has the runs: float32, AVX-512, 2048 x 2048 and batch 256 unless said otherwise.
#pragma once

#include <cstddef>
#include <cstdint>

namespace jaxsparse_cpu {

// ---- threads --------------------------------------------------------------------------------

// Multiply-adds that are worth a thread. An estimate: 10 us of a core at the full rate of AVX-512.
constexpr double kFmasPerWorker = 1e6;

// What an entry of a product over tiles costs, in multiply-adds: a few cycles of its own, and twice the loads of a
// block's for each row.
constexpr double kFmasPerEntry = 24, kFmasPerEntryAndRow = 2;

// What a line costs beside its entries, in entries, where lines are shared out: an empty one too is written. Shares of
// so many lines end at whole vectors of results. Estimates.
constexpr int64_t kEntriesPerLine = 4, kLinesWorthRounding = 64;

// Tasks for each worker where their sizes are free: the last to end is then not long alone. An estimate.
constexpr int64_t kTasksPerWorker = 8;

// Looks at a phase's counter before a thread that waits for the others gives up its core. An estimate.
constexpr int kLooks = 4096;

// ---- scratch memory --------------------------------------------------------------------------

// Buffers that are kept for the next call, and their bytes together: what a step of training takes in turns. An
// estimate.
constexpr int kKeptBuffers = 8;
constexpr size_t kKeptBytes = size_t{64} << 20;

// ---- register tiles --------------------------------------------------------------------------

// Rows of sums, two vectors wide: enough to hide the latency of the multiply-add, few enough that rows of x a power of
// two apart don't fight over one set of the first-level cache. Of a sampled product a tile must lie within one strip.
#if defined(__AVX2__) && !defined(__AVX512F__)  // vectors of 32 bytes, and 16 registers
constexpr int kRows = 6, kStripRows = 4;
#else
constexpr int kRows = 8, kStripRows = 8;
#endif

// Vectors of the widest panel of a product of blocks, and rows of its tile: 24 sums of the 32 registers, which need 10
// loads for 24 multiply-adds, where 8 rows of 2 vectors need 10 for 16. 1.04 to 1.1 times as fast.
#if defined(__AVX512F__)
constexpr int kPanelVectors = 4, kRowsOfWidePanel = 6;
#else
constexpr int kPanelVectors = 2, kRowsOfWidePanel = kRows;
#endif

// Terms that are summed in registers before their sum joins the others in memory. One long run would
// err in proportion to its length; in runs the error is that of a blocked dense product.
constexpr int64_t kRun = 64;

// Columns that one task of the gradient of a bias sums side by side. An estimate.
constexpr int64_t kColumnsOfSums = 64;

// ---- single entries and short blocks, over batch-minor tiles ---------------------------------

// Vectors of the widest tile of single entries, whose sums stay in registers. 8 instead of 4 are 1.02 to 1.19 times as
// fast with AVX2, 0.91 to 1.05 with AVX-512.
#if defined(__AVX512F__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 8;
#endif

// The same of short blocks, which hold a tile of sums for each row. An estimate.
constexpr int kTileVectorsOfBlocks = 2;

// Sums in flight that hide the latency of the multiply-add: short tiles keep several for each vector. An estimate.
constexpr int kSumsInFlight = 8, kVectorsWithoutChains = 4;

// Features that one task packs into tiles. An estimate.
constexpr int64_t kFeaturesPerSlab = 64;

// Features, whole vectors of them, that are packed for all rows of a tile before the next, which are fetched meanwhile.
// All features for each vector of rows in turn, which writes a tile by single lines of the cache: packing 256 rows of
// 2048 features alone took 0.25 ms instead of 0.17; 16 features at a time 0.21. A copy of them takes 0.15.
constexpr int64_t kPackedAtOnce = 32;
constexpr int kToSecondLevel = 2;  // of the caches, as __builtin_prefetch counts

// Bytes of packed tiles at a time: what many cores share as their last cache.
constexpr int64_t kRoundBytes = 16 << 20;

// Columns of y that one task of a product computes.
constexpr int64_t kColumnsPerTask = 256;

// Batch rows below which a transposed product of blocks, too, goes over tiles: they don't pay for transposing values.
constexpr int64_t kRowsWorthTransposing = 16;

// One row: how far ahead of their use values and indices are fetched. The hardware alone reaches two thirds to three
// quarters of the rate.
constexpr int64_t kFetchBytes = 4096;

// Bytes of the values of a short block that are fetched ahead, where values lie in another order than they are read:
// the hardware goes on from there. An estimate.
constexpr int64_t kFetchedOfBlock = 512;

// ---- single entries alone: slices of features that many lines read ---------------------------

// Of the product, in the first-level cache. 24, 32, 64, 128 and 256 KiB took 3.5, 3.2, 2.9, 5.2 and 3.2 ms at 10 %, on
// a busy machine.
constexpr int64_t kSliceBytes = 64 << 10;

// Of a product of one tile, whose entries are read but once: 1.0 to 1.1 times as fast as 64 KiB at batches of 8 to 64.
constexpr int64_t kOnlySliceBytes = 128 << 10;

// A slice is widened until a line meets so many entries in it, which pay for coming back to the line. At 0.5, 1 and 2 %
// of the entries 1.22, 1.14 and 1.1 times as fast as widening once.
constexpr int64_t kEntriesPerSlice = 16;

// Bytes of the entries of the line after next that are fetched ahead. That this is done is measured, 1.13 times as fast
// at 10 %; how far is an estimate.
constexpr int64_t kFetchedOfLine = 4096;

// Vectors of a tile of the gradients, which is held as a sum, and as operand too where there are 32 registers: one sum across
// lanes serves so many rows. 4 instead of 8: 7.5 against 5.1 ms at 10 % with AVX-512; with AVX2, which reads the operand from
// the first-level cache each time, 0.83 to 0.94 times as fast.
constexpr int kGradVectors = 8;

// Of the gradients, in the second-level cache, which sums and values share. 256 KiB instead of 512: 4.8 against 6.6 ms
// at 10 %, 9.4 against 15.4 at 25 %, on a machine with 1 MiB of it. At 5 % slices of 512 KiB are faster, 2.8 against
// 3.1 ms, and 1.13 times as fast as those of 1 MiB with one thread, even with two.
constexpr int64_t kGradSliceBytes = 256 << 10;
constexpr int64_t kEntriesPerGradSlice = 48;

// Lines that one part of the gradients takes at most: their operand and their sums share that cache too. Parts of 256
// lines are no faster.
constexpr int64_t kLinesPerPart = 512;

// Slabs of features that tiles of the gradients are packed by, and parts for each worker. Estimates.
constexpr int64_t kGradSlabs = 16, kGradPartsPerWorker = 2;

// ---- blocks ----------------------------------------------------------------------------------

// Below this many batch rows a copy of the values costs more than reading them as they lie.
constexpr int64_t kRowsWorthPacking = 16;

// From so many columns on, rows of a block lie so far apart that they fight over few sets of the caches, and panels are
// copied: blocks of 512 columns are 1.2 to 1.35 times as fast by it, of 1024 2.7 to 2.8 times.
constexpr int64_t kWideBlock = 512;

// Rows of an operand that are fetched ahead of the one in use. Without, the inner loop waits for the second-level cache:
// with it blocks of 32 and 64 are 1.0 to 1.1 times as fast, and 1.04 to 1.13 times more by fetching the next block's
// rows of x. 8 instead of 12 makes no difference.
constexpr int kFetchRows = 12;

// Bytes of each row of x that are fetched for the next block. All of them in blocks of 128 instead: 0.99 times as fast
// with AVX-512, 0.96 with AVX2; none: blocks of 32 at 10 % are 0.78 times as fast with AVX2. 128 bytes with AVX-512: 0.98.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int64_t kFetchedOfRow = 128;
#else
constexpr int64_t kFetchedOfRow = 256;
#endif

// Batch rows that one task takes: many where each packs values; else few from so many bytes of a row of x on, so that
// those rows stay in the second-level cache from line to line. 128 instead of 256: 1.04 to 1.19 times as fast at 10 %,
// 1.07 at 25 %, 0.98 at 50 %; with packing 0.92 to 0.98. 64 gain nothing more.
constexpr int64_t kTaskRows = 256, kTaskRowsOfWideX = 128, kWideXBytes = 6144;

// Batch rows of a sampled product that are summed in registers before the sums go through memory: two slices of so many
// rows stay in the second-level cache while all rows of a block are made from them.
constexpr int64_t kDeep = 512;

// Lines that meet each slice of x, and the rows of a block, up to which a sampled product reads x where it lies and takes
// the widest panels: block-diagonal ones, mostly. Others get x packed once, for all. 1.2 to 1.3 times as fast at
// blocks of 64, 1.0 to 1.1 at 256; in place, blocks of 512 and more are 0.74 to 1.05 times as fast, with AVX2
// those of 256, too. Slices of so many batch rows stay in the second-level cache, 512 are 0.93 times as fast.
constexpr int64_t kLinesInPlace = 1, kDeepInPlace = 256;
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int64_t kDepthInPlace = 128;
#else
constexpr int64_t kDepthInPlace = 256;
#endif

// ---- bfloat16 blocks on tile registers ----------------------------------------------------------

// How many times as fast a multiply-add is there as in a vector: what a thread is worth goes by that. An estimate.
constexpr double kTileSpeed = 8;

// Batch rows that one task takes: each rearranges the values of its lines.
constexpr int64_t kTaskRowsOfTiles = 512;

// Batch rows below which a transposed product takes vectors: with blocks of 16 and 32 at 10 %, tiles are 0.72 to 0.81
// times as fast at 16 rows, 0.7 to 1.3 times at 32, and 2 times at 64. x W gains from 16 rows on.
constexpr int64_t kRowsWorthTransposedTiles = 64;

// ---- n of every m ----------------------------------------------------------------------------

// Batch rows up to which W is expanded in registers, once for each two; above, panels of W are expanded into the
// second-level cache.
constexpr int64_t kFewRows = 4;

// Columns that a worker then takes at a time: runs of memory that are long enough, sums that stay in the first-level
// cache.
constexpr int64_t kStrip = 512;

}  // namespace jaxsparse_cpu

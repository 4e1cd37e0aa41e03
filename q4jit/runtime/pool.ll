; The thread pool of q4jit. A job is a range of tasks that several threads run together. The pool's
; state has 512 bytes and exists as long as this code. Its four groups of fields are 128 bytes (two
; cache lines) apart: threads that write one of them do not slow down readers of another.
;
;   byte    field
;     0     ptr pool_run: kernels call it through this address
;     8     i32 lock: 1 while a job runs
;    12     i32 stop: 1 when the workers shall return
;    16     ptr task, ptr args, i64 n, i64 chunk: the running job
;    48     i64 shares: a thread takes the remaining tasks divided by this (twice the threads)
;   128     i32 generation: the number of jobs so far; idle workers wait for it as a futex
;   132     i32 sleeping: workers that wait in the futex
;   256     i64 next: the first task that no thread has taken
;   384     i32 open: 1 while workers may join the job
;   388     i32 inside: workers that have joined it

target triple = "$triple"

@pool = global { ptr, [504 x i8] } { ptr @pool_run, [504 x i8] zeroinitializer }, align 128

; Take and run tasks until none is left. A thread takes a share of the remaining tasks, and at least
; a chunk. Early shares are long runs of adjacent tasks, which read memory as one stream. Later shares
; are short, so that a slow or late thread does not hold up the others.
define internal void @work(ptr %pool) #0 {
entry:
  %task.at = getelementptr i8, ptr %pool, i64 16
  %task = load ptr, ptr %task.at
  %args.at = getelementptr i8, ptr %pool, i64 24
  %args = load ptr, ptr %args.at
  %n.at = getelementptr i8, ptr %pool, i64 32
  %n = load i64, ptr %n.at
  %chunk.at = getelementptr i8, ptr %pool, i64 40
  %chunk = load i64, ptr %chunk.at
  %shares.at = getelementptr i8, ptr %pool, i64 48
  %shares = load i64, ptr %shares.at
  %next.at = getelementptr i8, ptr %pool, i64 256
  br label %look
look:
  %now = load atomic i64, ptr %next.at monotonic, align 8
  br label %take
take:
  %from = phi i64 [ %now, %look ], [ %seen, %try ]
  %more = icmp slt i64 %from, %n
  br i1 %more, label %try, label %done
try:
  %left = sub i64 %n, %from
  %share = udiv i64 %left, %shares
  %small = icmp slt i64 %share, %chunk
  %size = select i1 %small, i64 %chunk, i64 %share
  %end = add i64 %from, %size
  %beyond = icmp sgt i64 %end, %n
  %to = select i1 %beyond, i64 %n, i64 %end
  %taken = cmpxchg ptr %next.at, i64 %from, i64 %to monotonic monotonic
  %seen = extractvalue { i64, i1 } %taken, 0
  %mine = extractvalue { i64, i1 } %taken, 1
  br i1 %mine, label %run, label %take
run:
  call void %task(ptr %args, i64 %from, i64 %to)
  br label %look
done:
  ret void
}

; Run task(args, from, to) over 0 … n on all threads; return when every task is done.
define void @pool_run(ptr %pool, ptr %task, ptr %args, i64 %n, i64 %chunk) #0 {
entry:
  %lock = getelementptr i8, ptr %pool, i64 8
  %was = cmpxchg ptr %lock, i32 0, i32 1 seq_cst seq_cst
  %free = extractvalue { i32, i1 } %was, 1
  br i1 %free, label %publish, label %alone
alone:
  ; another thread's job is running: do all tasks in this thread
  call void %task(ptr %args, i64 0, i64 %n)
  ret void
publish:
  %task.at = getelementptr i8, ptr %pool, i64 16
  store ptr %task, ptr %task.at
  %args.at = getelementptr i8, ptr %pool, i64 24
  store ptr %args, ptr %args.at
  %n.at = getelementptr i8, ptr %pool, i64 32
  store i64 %n, ptr %n.at
  %chunk.at = getelementptr i8, ptr %pool, i64 40
  store i64 %chunk, ptr %chunk.at
  %next.at = getelementptr i8, ptr %pool, i64 256
  store i64 0, ptr %next.at
  %open = getelementptr i8, ptr %pool, i64 384
  store atomic i32 1, ptr %open seq_cst, align 4
  %generation = getelementptr i8, ptr %pool, i64 128
  %old = atomicrmw add ptr %generation, i32 1 seq_cst
  %sleeping.at = getelementptr i8, ptr %pool, i64 132
  %sleeping = load atomic i32, ptr %sleeping.at seq_cst, align 4
  %none = icmp eq i32 %sleeping, 0
  br i1 %none, label %join, label %wake
wake:
  ; 129 is FUTEX_WAKE | FUTEX_PRIVATE_FLAG; 2147483647 wakes all workers
  %woken = call i64 (i64, ...) @syscall(i64 $futex, ptr %generation, i64 129, i64 2147483647)
  br label %join
join:
  call void @work(ptr %pool)
  ; Close the job, then wait for the workers inside it. This thread writes `open` and then reads
  ; `inside`; a worker writes `inside` and then reads `open`. All four are sequentially consistent,
  ; so at least one of the two sees the other's write: no worker starts after this loop ends.
  store atomic i32 0, ptr %open seq_cst, align 4
  %inside = getelementptr i8, ptr %pool, i64 388
  br label %wait
wait:
  %round = phi i32 [ 0, %join ], [ %round.next, %again ]
  %count = load atomic i32, ptr %inside seq_cst, align 4
  %finished = icmp eq i32 %count, 0
  br i1 %finished, label %unlock, label %linger
linger:
  $pause
  %round.next = add i32 %round, 1
  %long = icmp ugt i32 %round.next, $yield_after
  br i1 %long, label %yield, label %again
yield:
  %yielded = call i32 @sched_yield()
  br label %again
again:
  br label %wait
unlock:
  store atomic i32 0, ptr %lock release, align 4
  ret void
}

; Be a worker: wait for jobs and help with them; return after pool_stop.
define void @pool_worker(ptr %pool) #0 {
entry:
  %stop.at = getelementptr i8, ptr %pool, i64 12
  %generation = getelementptr i8, ptr %pool, i64 128
  %sleeping = getelementptr i8, ptr %pool, i64 132
  %open.at = getelementptr i8, ptr %pool, i64 384
  %inside = getelementptr i8, ptr %pool, i64 388
  br label %idle
idle:
  %seen = phi i32 [ 0, %entry ], [ %now, %leave ]
  br label %poll
poll:
  %round = phi i32 [ 0, %idle ], [ %round.next, %spin ], [ 0, %slept ]
  %now = load atomic i32, ptr %generation seq_cst, align 4
  %changed = icmp ne i32 %now, %seen
  br i1 %changed, label %job, label %unchanged
unchanged:
  %tired = icmp uge i32 %round, $spin_rounds
  br i1 %tired, label %sleep, label %spin
spin:
  $pause
  %round.next = add i32 %round, 1
  br label %poll
sleep:
  %s0 = atomicrmw add ptr %sleeping, i32 1 seq_cst
  ; 128 is FUTEX_WAIT | FUTEX_PRIVATE_FLAG. It returns at once if the generation is no longer %seen.
  %w = call i64 (i64, ...) @syscall(i64 $futex, ptr %generation, i64 128, i32 %seen, ptr null)
  br label %slept
slept:
  %s1 = atomicrmw sub ptr %sleeping, i32 1 seq_cst
  br label %poll
job:
  %stop = load atomic i32, ptr %stop.at seq_cst, align 4
  %stopped = icmp ne i32 %stop, 0
  br i1 %stopped, label %end, label %enter
enter:
  %i0 = atomicrmw add ptr %inside, i32 1 seq_cst
  %open = load atomic i32, ptr %open.at seq_cst, align 4
  %closed = icmp eq i32 %open, 0
  br i1 %closed, label %leave, label %help
help:
  call void @work(ptr %pool)
  br label %leave
leave:
  %i1 = atomicrmw sub ptr %inside, i32 1 seq_cst
  br label %idle
end:
  ret void
}

; Let the workers return.
define void @pool_stop(ptr %pool) #0 {
entry:
  %stop.at = getelementptr i8, ptr %pool, i64 12
  store atomic i32 1, ptr %stop.at seq_cst, align 4
  %generation = getelementptr i8, ptr %pool, i64 128
  %old = atomicrmw add ptr %generation, i32 1 seq_cst
  %woken = call i64 (i64, ...) @syscall(i64 $futex, ptr %generation, i64 129, i64 2147483647)
  ret void
}

declare i64 @syscall(i64, ...)
declare i32 @sched_yield()
$declare_pause

attributes #0 = { nounwind }
